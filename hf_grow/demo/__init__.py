"""`hf-grow demo`: the whole story on real text in under three minutes, on a CPU and without the network.

    text.py      prose and sources that come with Python, as documents
    settings.py  every number of the demo, full and quick
    pretrain.py  the tokenizer, the small model, and training with the Trainer of transformers
    cache.py     the trained small model, kept from one demo to the next
    show.py      what it prints while it works; starts the commands
    report.py    the result as a table and as a figure
    run.py       the story, stage by stage

Nothing here grows a model: that is the real command, `hf-grow dus`, started just as a user would start it.
"""
