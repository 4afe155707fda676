def page(paths):
    return "# In the browser\n"
