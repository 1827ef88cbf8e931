"""What of a conversation a model reads and learns: `template` lays it out as tokens with weights, `text_objective`
changes what of a document is learned.
"""
