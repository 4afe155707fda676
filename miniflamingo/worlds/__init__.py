"""The data: a world small enough to learn in minutes, and files from disk.

shapes.py draws the pictures: coloured shapes and handwritten digits, one, two or moving.
grammar.py has the words: captions, questions, and episodes that bind an invented name to a class.
datasets.py puts both together: what the bridge is trained on, and what it is asked.

glyphs.py is a world of many classes, letters and signs, with whole scripts held out; glyph_texts.py
has its words, glyph_documents.py puts both together, glyph_masks.py made the file of its masks.

disk.py reads image and caption pairs from disk, interleaved.py whole pages and video.py clips;
records.py is what they share: records, files, reports; pictures come in through ../pictures.py.
"""
