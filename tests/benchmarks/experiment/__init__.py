"""The experiment on real speech: its world, its models, its configuration, and the table and plot of its rows.

`recordings` divides the recordings among the splits, `world` composes clips from them and asks about them, `lessons`
makes and teaches the models, `settings` writes kdpipe.yaml, `outcome` draws what `kdpipe rows` measured.
"""
