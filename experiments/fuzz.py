"""Damaged and hostile files: every reader, given 20,000 mutants of good files, gives a result or a clear error, soon.

    specjax run experiments/fuzz.py                      # some ten minutes on two cores
    specjax run experiments/fuzz.py --mutants 500 --readers gguf tree

A mutant has one to four changes: bytes flipped, cut, repeated or overwritten by extreme numbers, JSON nodes replaced,
tensor headers and archives that are sound but say something else, template snippets. Whatever ends otherwise than in a
result or a SpecJaxError, or takes more than 2 seconds or 500 MB, is a find.
"""

from specjax.studies.fuzz import Fuzz


def get_config() -> Fuzz:
    return Fuzz(name="fuzz")
