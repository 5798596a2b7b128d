"""What all rows share: the scratch directory, the size of a run, images, and our running product.

Images are made when first asked for and kept for the whole run, so that a peer meets the same file
in each row. The product is started once: its history grows over the rows as a user's would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from scripts.benchmark.memory import Sampler, sampling
from scripts.benchmark.ours import Ours, ours
from scripts.benchmark.processes import MeasurementError, Scratch, Service


@dataclass
class Bench:
    """One run of the benchmark."""

    scratch: Scratch
    stack: ExitStack
    rounds: int
    seconds: float  # of load in each turn
    image_bytes: int
    records: int  # of the longest journal
    peers_only: bool
    progress: Callable[[str], None]
    images: dict[str, Path] = field(default_factory=dict)
    _product: Ours | None = None
    _sampler: Sampler | None = None
    _unavailable: str = ""

    def image(self, owner: str) -> Path:
        """The owner's raw image: same size, same file system, incompressible, no holes."""
        if owner not in self.images:
            self.progress(f"making the image of {owner}")
            self.images[owner] = self.scratch.image(self.image_bytes)
        return self.images[owner]

    def product(self) -> Ours:
        """Our product, started when first asked for. MeasurementError when it does not start."""
        if self._unavailable:
            raise MeasurementError(self._unavailable)
        if self._product is None:
            image = self.image("ours")
            self.progress("starting receiver, agent and server; first sync")
            try:
                self._product = self.stack.enter_context(ours(self.scratch, image))
            except MeasurementError as error:
                self._unavailable = f"blockrepl did not start: {error}"
                raise MeasurementError(self._unavailable) from error
            self._sampler = self.stack.enter_context(sampling(self._services))
        return self._product

    def sampler(self) -> Sampler:
        """The memory of our processes, since they were started."""
        self.product()
        assert self._sampler is not None
        return self._sampler

    def _services(self) -> Mapping[str, Service]:
        return self._product.services() if self._product is not None else {}
