"""RUN/run.json: where a run in stages stands. Each change is one atomic write, so that a killed run resumes at the right stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_grow.common.safe_files import read_json
from hf_grow.convert.metadata import versions
from hf_grow.errors import OutputError, SourceError
from hf_grow.training.config.stage_options import Stage
from hf_grow.training.setup.provenance import recorded_settings
from hf_grow.training.stages.stop import Spent
from hf_grow.training.trainer.checkpointing import write_json

RUN_FILE = "run.json"


class RunLog:
    """The stages of a run that have ended, each with the checkpoint that the next one starts from."""

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.folder, self.data = folder, data

    @staticmethod
    def create(folder: Path, recipe: Mapping[str, Any]) -> RunLog:
        return RunLog(folder, {"recipe": recorded_settings(recipe), "made_by": versions(), "ended": []})

    @staticmethod
    def open(folder: Path) -> RunLog:
        """Raises SourceError for a damaged file."""
        data = read_json(folder / RUN_FILE)
        log = RunLog(folder, data)
        try:
            for entry in log.ended:
                Spent(**entry["spent"])
                str(entry["checkpoint"])
        except (KeyError, TypeError):
            raise SourceError(f"{folder / RUN_FILE} is damaged.", hint="Start the run again with --overwrite.") from None
        return log

    @property
    def ended(self) -> Sequence[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = self.data["ended"]
        return found

    @property
    def spent(self) -> Spent:
        return Spent(**self.ended[-1]["spent"]) if self.ended else Spent()

    @property
    def last_checkpoint(self) -> Path | None:
        """Of the last stage that has ended."""
        return self.folder / self.ended[-1]["checkpoint"] if self.ended else None

    def end_stage(self, stage: Stage, checkpoint: Path, spent: Spent, reason: str, *, write: bool, **facts: Any) -> None:
        """Records the end of a stage; with ``write`` (in the main process) on the disk before it returns."""
        entry = {
            "stage": stage.index, "name": stage.title, "checkpoint": checkpoint.relative_to(self.folder).as_posix(), "reason": reason,
            "spent": spent.to_json(), **facts,
        }  # fmt: skip
        self.data["ended"] = [*self.ended, entry]
        if write:
            self.write()

    def write(self) -> None:
        write_json(self.folder / RUN_FILE, self.data)

    def check_same(self, recipe: Mapping[str, Any]) -> list[str]:
        """Keys that changed since the run began. Raises OutputError if stages that have ended are others, or start from another model."""
        before, now = self.data["recipe"], recorded_settings(recipe)
        if before.get("model") != now.get("model"):
            raise OutputError(
                f"{self.folder} is a run from {before.get('model')}, not from {now.get('model')}.", hint="Choose another folder with -o."
            )
        count = len(self.ended)
        if before.get("stages", [])[:count] != now.get("stages", [])[:count]:
            raise OutputError(
                f"The first {count} stages of {self.folder} have ended, and the recipe changes them.",
                hint="Change later stages only, or choose another folder with -o.",
            )
        return sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
