"""The data: a world small enough to learn in minutes, and files from disk.

    shapes.py    the pictures: coloured shapes and handwritten digits, one or two of them, or moving
    grammar.py   the words: captions, questions, and episodes that bind an invented name to a class
    datasets.py  pictures and words together: what the bridge trains on and what it is asked
"""
