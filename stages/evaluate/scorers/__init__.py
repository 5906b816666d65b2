"""The benchmarks' own rules, one module each: when an answer is right, and what the score is.

Each module has `is_correct(answer, prediction, choices)`, which agrees with the benchmark's published script to the
item, and `score(items)`, which gives the official score and the strict one (see `counting`). They judge texts as they
stand in the file that the official script reads; what a model said is made ready for that file by
`kdpipe.stages.evaluate.benchmarks`.
"""
