"""Names and files to tasks. A few names fail in the ways that the real ones do."""

import json
from pathlib import Path

import yaml


class Task:
    def __init__(self, config):
        self.config = {"num_fewshot": None, **config}
        self.seed = None
        with open(config["dataset_kwargs"]["data_files"]["test"], encoding="utf-8") as lines:  # from the current folder
            self.docs = [json.loads(line) for line in lines]
        if config["task"] == "pictures":
            self.MULTIMODAL = True
        if config["task"] == "codes":
            self.UNSAFE_CODE = True
        self._metric_fn_list = {m["metric"]: None if m["metric"].startswith("no_") else max for m in config["metric_list"]}

    def get_config(self, key):
        return self.config[key]

    def set_config(self, key, value):
        self.config[key] = value

    def set_fewshot_seed(self, seed):
        self.seed = seed


class TaskManager:
    def __init__(self, include_path=None, include_defaults=True):
        self.include_path = include_path
        self.all_tasks = ["arc_easy", "arc_challenge", "broken", "hellaswag"] if include_defaults else []

    def load(self, specs):
        tasks = {}
        for spec in specs:
            if spec == "broken":
                raise TypeError("unexpected keyword argument 'misspelt'\nsecond line")
            if spec in self.all_tasks:
                try:
                    raise FileNotFoundError("not cached")
                except FileNotFoundError:
                    raise ConnectionError(f"Couldn't reach '{spec}' on the Hub") from None
            print("loading", spec)
            config = yaml.safe_load(Path(spec).read_text(encoding="utf-8"))
            tasks[config["task"]] = Task(config)
        return {"tasks": tasks, "groups": {}, "group_map": {}}
