"""From a configuration to a dataset: the graph that samples go through.

`settings` checks the configuration and plans the sources, `graph` runs the stages and keeps in `store` what they made,
`graph_dedupe` is the one stage that sees all samples at once, and `beam_graph` is the same graph on Apache Beam.
"""
