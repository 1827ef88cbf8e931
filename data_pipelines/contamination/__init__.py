"""Which items of benchmarks a text holds.

`eval_items` reads the benchmarks, `index` makes an index of them, `overlap` looks a text up in it; `ngrams` are the
words and runs that both compare.
"""
