"""Names of classes that no stage of training has seen: measured, and what makes it possible.

measure.py asks a bridged model about glyphs of held-out scripts, beside what a guess and the eye
alone reach; experiments.py trains what explains it; commands.py is the command line.
"""
