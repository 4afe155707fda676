"""The paper's ablations at this size: bridges that differ in one choice each, and what can be told.

rows        each row of the table: one difference of config, or of the model
stage       trains a row, and asks it
statistics  differences between rows over seeds, with intervals, and verdicts
commands    the command line, resumable, over several processes

python -m miniflamingo ablate
"""
