"""A Flamingo of real parts: a frozen language model that knows English, a frozen eye that knows
photographs, pictures that four artists drew, and a bridge trained here.

    parts       the packages that hold them, fetched once
    pictures    1,279 named concepts; how a picture is composed; what is held out
    features    every picture, seen once by the frozen eye
    documents   captions, questions, kinds and invented names, interleaved
    model       the parts and the bridge as one Flamingo
    stages      what is trained: a contrastive warm start, then the bridge
    measure     every figure, as data
    examples    answers that are kept, with their pictures; kept.py reads them
    page        what there is to look at

    python -m miniflamingo real
"""
