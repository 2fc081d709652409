"""Studies: the same policy under several methods and seeds, compared with honest intervals.

    STUDY.yaml --(plan)--> runs --(runner)--> run folders --(results)--> tables --(figures, page)--> docs/study/

`rest-jax study STUDY.yaml` makes or continues all runs and writes the pages; every run is an ordinary run folder.
"""
