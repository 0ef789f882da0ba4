"""Threshold profiles: what FP8 must keep, by name, from profiles.toml."""

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mmdit.errors import QuantizationError
from quality.figure import FIGURES, Figure

PROFILES = Path(__file__).with_name("profiles.toml")


class Threshold(BaseModel):
    """Bounds of one figure, and of its floor; profiles.toml says what each field means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at_least: float | None = None
    at_most: float | None = None
    floor_at_least: float | None = None
    floor_at_most: float | None = None
    eased_by_floor: bool = False
    optional: bool = False

    @model_validator(mode="after")
    def _bounded(self) -> "Threshold":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("expected either at_least or at_most")
        return self

    def bound(self, floor: float | None) -> float:
        """What FP8's figure is held to, given its floor."""
        chosen = self.at_least if self.at_least is not None else self.at_most
        assert chosen is not None
        if not self.eased_by_floor or floor is None:
            return chosen
        return min(chosen, floor) if self.at_least is not None else max(chosen, floor)

    def judged(self, figure: Figure) -> str | None:
        """Why the figure fails; None when it is good enough, or may be absent and is."""
        label = FIGURES[figure.name].label
        if figure.fp8 is None:
            return None if self.optional else f"{label} was not measured ({figure.absent})"
        least = self.at_least is not None
        bound, word = self.bound(figure.floor), "at least" if least else "at most"
        if not (figure.fp8 >= bound if least else figure.fp8 <= bound):
            return f"{label} is {figure.fp8:.4g}, expected {word} {bound:.4g}"
        for limit, word in ((self.floor_at_least, "at least"), (self.floor_at_most, "at most")):
            if limit is None or figure.floor is None:
                continue
            if not (figure.floor >= limit if word == "at least" else figure.floor <= limit):
                return (
                    f"{label} of FP16 against FP32 is {figure.floor:.4g}, expected {word} {limit:.4g}: FP16 "
                    "itself is not right, so it cannot judge FP8"
                )
        return None


class Profile(BaseModel):
    """Thresholds by figure; `measured` says what their numbers rest on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str
    measured: str
    thresholds: dict[str, Threshold]

    @model_validator(mode="after")
    def _of_known_figures(self) -> "Profile":
        if unknown := self.thresholds.keys() - FIGURES.keys():
            raise ValueError(f"{sorted(unknown)} are no figures: expected some of {', '.join(FIGURES)}")
        return self


def profile(name: str, file: Path = PROFILES) -> Profile:
    """The profile called `name`; raises QuantizationError for one that is unknown or cannot be right."""
    try:
        profiles = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise QuantizationError(f"{file} cannot be read: {error}") from None
    if name not in profiles:
        raise QuantizationError(f"profile {name!r} is unknown: expected one of {', '.join(profiles)}")
    try:
        return Profile.model_validate(profiles[name])
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"]))
        raise QuantizationError(f"{file}: {name}.{where}: {wrong['msg']}") from None
