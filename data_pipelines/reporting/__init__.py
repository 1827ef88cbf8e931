"""What `data_pipelines.report` is made of: each module finds one kind of figure, and `page` sets them.

accounts    what came in, what left where and why, what was written: from the manifest
rejects     samples of what was left out, and which samples duplicates were copies of: from rejects.jsonl
scan        a pass over all examples: characters, turns, roles, repeated questions
recipe      the tokenizer, template and row length, from flags or from a run
encoding    a sample of the examples, as tokens: lengths, what is learned, how rows fill up
rendered    some examples, token by token
mixing      which source comes how often
runs        the logs of training runs
charts      pictures, as SVG
page        numbers and texts as HTML, of which none can break out of its place
"""
