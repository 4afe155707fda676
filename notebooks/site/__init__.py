"""The course as web pages and as slides; nothing in them is fetched from elsewhere when read."""
