"""`hf-grow demo`: the commands of hf-grow, run one after another on a small model and the text that comes with Python.

``domains.py`` makes the text, ``small_model.py`` the tokenizer and the random weights; everything else is done by commands of hf-grow
(``run.py``) with the recipes ``pretrain.yaml`` and ``train.yaml``. ``report.py`` shows the result.
"""
