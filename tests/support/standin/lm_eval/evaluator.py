"""Results in the form of the harness, from the plain scorer; RUNS tells what was asked for."""

import random
import weakref

from plain_tasks import plain_scores

import lm_eval


def evaluate(lm, task_dict, limit=None, log_samples=True):
    alive = [run["model"] for run in lm_eval.RUNS if run["model"]() is not None]
    lm_eval.RUNS.append({
        "model": weakref.ref(lm.model), "others_alive": len(alive), "tasks": dict(task_dict["tasks"]), "limit": limit,
        "batch_size": lm.batch_size, "log_samples": log_samples, "random": random.random(),
    })  # fmt: skip
    found = {"results": {}, "n-shot": {}, "n-samples": {}, "versions": {}, "higher_is_better": {}, "group_subtasks": {}}
    print("a line on stdout")
    for name, task in task_dict["tasks"].items():
        if name == "fails":
            raise ZeroDivisionError("division by zero\nin some line")
        docs = task.docs[:limit]
        scores = plain_scores(lm.model.config.name_or_path, docs)
        found["results"][name] = {
            "alias": name, "sample_len": len(docs), **{f"{metric},none": value for metric, value in scores.items()}, "words,strict": 1, "words_stderr,strict": "N/A",
        }  # fmt: skip
        found["n-shot"][name] = task.get_config("num_fewshot")
        found["n-samples"][name] = {"original": len(task.docs), "effective": len(docs)}
        found["versions"][name] = task.config["metadata"]["version"]
        found["higher_is_better"][name] = {"acc": True}
    return found
