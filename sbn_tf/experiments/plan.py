"""Plans: the one YAML format that says what a grid or a study trains.

    plan:
      name: small                       # of the folder of its runs and of its table
      recipe: sbn
      seeds: [0, 1, 2]
      datasets:
        lidc: {size: 32, network: unet_small, folds: [0, 1]}
      methods: [deterministic, ensemble]  # of the grid: a job for each,
      r_bayes: [0.01, 0.2]                # and one of `partial` for each share of Bayesian weights
      questions:                          # of a study
        scale:
          text: Where should scales start?
          variants:
            - {label: wide, changes: "initial_scale=0.3"}

Reading a plan loads no TensorFlow: `study.check_names` checks the names of recipe, networks and methods.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)

__all__ = ["Variant", "read"]


def _each_once(values):
    if len({f"{value:g}" if isinstance(value, float) else value for value in values}) < len(values):
        raise ValueError("each value once, numbers in six digits")
    return values


Count = Annotated[int, Strict(), Field(ge=0)]
Number = Annotated[int, Strict(), Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
Seeds = Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(_each_once)]
Folds = Annotated[tuple[Annotated[int, Strict(), Field(ge=-1)], ...], Field(min_length=1), AfterValidator(_each_once)]
Methods = Annotated[tuple[Name, ...], AfterValidator(_each_once)]
Share = Annotated[float, Strict(), Field(ge=0, le=1)]
Shares = Annotated[tuple[Share, ...], AfterValidator(_each_once)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Dataset(_Part):
    """One dataset of a plan: what is trained on it, and parameters of the notebooks as `compare.experiment` takes them.

    Args:
        folds: its folds; (-1,): the dataset's own split.
        seeds, methods, r_bayes: the plan's, unless this dataset has its own.
        images: training, validation and test images, for estimates of a dataset that is not on this machine.
        split: of LIDC's patients.
    """

    folds: Folds
    seeds: Seeds
    methods: Methods = ()
    r_bayes: Shares = ()
    images: tuple[Count, Count, Count] | None = None
    size: Number | None = None
    network: Name | None = None
    limit: Number | None = None
    epochs: Number | None = None
    bayes_epochs: Number | None = None
    num_samples: Number | None = None
    split: Literal["patient", "paper"] | None = None
    normalisation: Literal["train", "paper"] | None = None
    changes: str | None = None
    threshold: float | Literal["validation"] | None = None
    num_resamples: Number | None = None
    swapped: Name | None = None

    @field_validator("methods")
    @classmethod
    def _without_partial(cls, methods):
        if "partial" in methods:
            raise ValueError("methods without 'partial', which r_bayes asks for")
        return methods

    @property
    def parameters(self) -> dict[str, Any]:
        """What is set of the notebooks' parameters."""
        return self.model_dump(exclude={"folds", "seeds", "methods", "r_bayes", "images"}, exclude_none=True)

    def arguments(self, fold: int = -1) -> dict[str, Any]:
        """The same as `compare.experiment` takes it, of one fold."""
        found = self.parameters
        options = {"fold": fold, "split": found.pop("split", None)}
        return {**found, "options": {key: value for key, value in options.items() if value not in (-1, None)}}


class Variant(_Part):
    """One row of a question's table.

    Args:
        label: what the table calls it.
        method: a name of `METHODS`.
        r_bayes: fraction of the eligible weights that is Bayesian, 0..1.
        changes: of the recipe, as `recipes.parse_changes` reads them.
        num_samples: of a prediction; None: the recipe's.
    """

    label: Name
    method: Name = "partial"
    r_bayes: Share = 0.01
    changes: str = ""
    num_samples: Number | None = None


class Question(_Part):
    """A question of a study: `text`, and the variants whose rows answer it."""

    text: Name
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]

    @field_validator("variants")
    @classmethod
    def _labels_once(cls, variants):
        if len({one.label for one in variants}) < len(variants):
            raise ValueError("each label once")
        return variants


class Plan(_Part):
    """What a grid or a study trains.

    Args:
        name: of the folder of a grid's runs, `runs/grid/<name>`, and of the table.
        datasets: name, as `datasets.load` takes it -> what is trained on it.
        recipe: of `recipes.RECIPES`.
        questions: name -> question, of a study.
        table: path of the CSV; None: a grid has it in the folder of its runs, a study in `results/<name>.csv`.
        threads: of one job.
        gpus: of one job, requested as Snakemake's resource `gpu`.
        tflops: what the device computes, in 10^12 operations a second, for estimates; None: they are in operations.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    datasets: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], Dataset], Field(min_length=1)]
    recipe: Name = "sbn"
    questions: dict[str, Question] = {}
    table: Name | None = None
    threads: Number = 1
    gpus: Count = 0
    tflops: Annotated[float, Strict(), Field(gt=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _share_with_datasets(cls, content):
        """Give each dataset the plan's own seeds, methods and shares, where it has none."""
        if not isinstance(content, dict) or not isinstance(content.get("datasets"), dict):
            return content
        shared = {"folds": [-1], **{key: content[key] for key in _SHARED if key in content}}
        own = {
            name: {**shared, **(one or {})} if isinstance(one, dict | None) else one
            for name, one in content["datasets"].items()
        }
        return {**{key: value for key, value in content.items() if key not in _SHARED}, "datasets": own}

    @property
    def folder(self) -> Path:
        """Where a grid's jobs and runs lie."""
        return Path("runs") / "grid" / self.name


_SHARED = ("seeds", "methods", "r_bayes")


def read(path: str | os.PathLike) -> Plan:
    """Read a plan.

    Args:
        path: a YAML file with a key `plan`, or a profile of Snakemake: the folder of such a `config.yaml`.

    Raises:
        ValueError: not such a file, an unknown key, a value out of its range.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    path = path / "config.yaml" if path.is_dir() else path
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"Expected YAML in {path}. Received: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or "plan" not in content:
        raise ValueError(f"Expected a key `plan` in {path}, with datasets, and methods or questions. Received: none")
    return plan_of(content["plan"], path)


def plan_of(content: dict, where: str | os.PathLike = "the plan") -> Plan:
    """Check the content of a plan; the message of a ValueError names the first key or value that is wrong."""
    try:
        return Plan.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
    place, received = [str(part) for part in first["loc"]], first["input"]
    if first["type"] == "extra_forbidden":
        *place, received = place
        expected = f"keys among {', '.join(_keys_at(place))}"
    else:
        expected = first["msg"].removeprefix("Value error, ")
    at = ".".join(place) or "a plan"
    raise ValueError(f"Expected in {where}, {at}: {expected}. Received: {received!r}")


def _keys_at(place):
    parts = {"datasets": Dataset, "questions": Variant if "variants" in place else Question}
    part = parts.get(place[0], Plan) if place else Plan
    return sorted({*part.model_fields, *(_SHARED if part is Plan else ())})
