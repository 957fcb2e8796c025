"""What a plan does: the map of patterns over layers and heads, densities, and predicted and measured speed."""

from __future__ import annotations

import dataclasses
import string
from typing import Any

import torch
from torch.nn import functional as F

from zoo.heads.sparse_vdit.plan import Grid, SparsePlan
from zoo.heads.sparse_vdit.record import median_seconds
from zoo.kernels.tile_sparse import Pattern, density, tile_sparse_attention

# One letter a pattern, and a colour a kind.
SYMBOLS = {"full": "#", "skip": ".", "diagonal": string.ascii_lowercase, "multi_diagonal": string.ascii_uppercase}
STRIPES = string.digits[1:] + string.digits[:1]
STYLES = {"full": "red", "skip": "dim", "diagonal": "blue", "multi_diagonal": "green", "vertical_stripe": "yellow"}


@dataclasses.dataclass(frozen=True)
class PlanReport:
    """A plan at one token grid. Prints as text, or in colour through rich.

    Attributes:
        plan: The plan.
        grid, text_length: The joint sequence.
        density: Share of tiles that each pattern of the plan's table computes here.
        costs: Time of each pattern relative to full attention; its density where the plan records no measured ones
            for this grid.
        attention_share: Share of attention in the time of a dense forward pass, if known.
        measured: Result of `measure`, if it was called.
    """

    plan: SparsePlan
    grid: Grid
    text_length: int
    density: tuple[float, ...]
    costs: tuple[float, ...]
    attention_share: float | None = None
    measured: dict[str, Any] | None = None

    @classmethod
    def of(cls, plan: SparsePlan, grid: Grid, text_length: int, attention_share: float | None = None) -> PlanReport:
        """Describe a plan at a token grid.

        Args:
            plan: The plan.
            grid: Frames, height and width in tokens.
            text_length: Number of text tokens.
            attention_share: Share of attention in the time of a dense forward pass, in (0, 1]; with it, the speed of
                a whole forward pass is predicted too.

        Raises:
            ValueError: The share is out of range.
        """
        if attention_share is not None and not 0 < attention_share <= 1:
            raise ValueError(f"attention_share must lie in (0, 1], got {attention_share}.")
        layout = plan.layout(grid, text_length)
        densities = tuple(density(p, layout) for p in plan.parsed())
        costs, searched = plan.search.get("costs"), plan.calibrated.get("grid")
        # The search's costs are of its candidates, which follow the full pattern in the table.
        measured = costs is not None and list(grid) == list(searched or ()) and len(costs) == len(densities) - 1
        return cls(plan, grid, text_length, densities, (1.0, *costs) if measured else densities, attention_share)

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] + self.text_length

    @property
    def bin_weights(self) -> list[float]:
        """Share of the steps in each bin: as counted by the search, else by the bin's range of noise levels."""
        steps = self.plan.search.get("bin_steps")
        if not steps or len(steps) != self.plan.num_bins:
            steps = [b - a for a, b in zip(self.plan.bins, self.plan.bins[1:], strict=False)]
        return [n / sum(steps) for n in steps]

    def bin_means(self, table: tuple[float, ...]) -> list[float]:
        """Mean over layers and heads of a value of each pattern, for each bin."""
        means = []
        for by_layer in self.plan.assign:
            ids = [i for layer in by_layer for i in layer]
            means.append(sum(table[i] for i in ids) / len(ids))
        return means

    def mean(self, table: tuple[float, ...]) -> float:
        """Mean over all steps, layers and heads."""
        return sum(w * m for w, m in zip(self.bin_weights, self.bin_means(table), strict=True))

    def shares(self) -> list[float]:
        """Share of each pattern over all steps, layers and heads."""
        one = [tuple(float(i == n) for i in range(len(self.density))) for n in range(len(self.density))]
        return [self.mean(table) for table in one]

    @property
    def attention_speedup(self) -> float | None:
        """Predicted: dense attention time over that of the plan; None if nothing is left of it."""
        cost = self.mean(self.costs)
        return 1 / cost if cost else None

    @property
    def model_speedup(self) -> float | None:
        """Predicted speed-up of a whole run of the transformer, where the share of attention is known."""
        if self.attention_share is None:
            return None
        return 1 / (1 - self.attention_share * (1 - self.mean(self.costs)))

    @property
    def attention_flops(self) -> float:
        """FLOPs of dense attention in one forward pass of one sample."""
        model = self.plan.model
        return 4.0 * self.tokens**2 * model["heads"] * model["head_dim"] * len(model["layers"])

    def measure(
        self,
        device: torch.device | str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        backend: str = "auto",
        repeats: int = 5,
    ) -> PlanReport:
        """Time the plan's attention against torch's dense attention, on random tensors of one sample.

        Layers with equal counts of patterns are timed once.

        Args:
            device, dtype: Where and in what.
            backend: Of `zoo.kernels.tile_sparse.tile_sparse_attention`.
            repeats: The median of so many runs counts.

        Returns:
            The report with `measured`: milliseconds of attention in one forward pass, dense and for each bin, and the
            speed-up over all steps.
        """
        model, layout = self.plan.model, self.plan.layout(self.grid, self.text_length)
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (1, model["heads"], layout.tokens, model["head_dim"])
        q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
        patterns, times = self.plan.parsed(), {}

        def layer_ms(ids: tuple[int, ...]) -> float:
            key = tuple(sorted(ids))
            if key not in times:
                tensor = torch.tensor(key, device=device)
                times[key] = 1000 * median_seconds(
                    lambda: tile_sparse_attention(q, k, v, tensor, patterns, layout, backend=backend), q, repeats
                )
            return times[key]

        with torch.no_grad():
            dense = 1000 * median_seconds(lambda: F.scaled_dot_product_attention(q, k, v), q, repeats)
            # A layer without a sparse head runs the stock processor.
            bins = [
                sum(dense if all(patterns[i].name == "full" for i in ids) else layer_ms(ids) for ids in by_layer)
                for by_layer in self.plan.assign
            ]
        dense *= len(model["layers"])
        mean = sum(w * ms for w, ms in zip(self.bin_weights, bins, strict=True))
        name = torch.cuda.get_device_name(q.device) if q.is_cuda else str(q.device)
        result = dict(device=name, dtype=str(dtype), dense_ms=dense, bins_ms=bins, speedup=dense / max(mean, 1e-9))
        return dataclasses.replace(self, measured=result)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "model": self.plan.model["class"],
            "grid": list(self.grid),
            "text_length": self.text_length,
            "tokens": self.tokens,
            "density": self.mean(self.density),
            "bin_density": self.bin_means(self.density),
            "shares": self.shares(),
            "attention_flops": self.attention_flops,
            "attention_speedup_predicted": self.attention_speedup,
            "model_speedup_predicted": self.model_speedup,
            "measured": self.measured,
        }

    def __rich__(self):
        from rich.console import Group

        maps = [self._map(b) for b in reversed(range(self.plan.num_bins))]
        return Group(self._head(), self._legend(), *maps, self._speed())

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=max(100, self.plan.model["heads"] + 60), color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()

    def _head(self) -> str:
        model, (frames, height, width) = self.plan.model, self.grid
        text = "" if self.plan.text_position == "none" else f" + {self.text_length} text (at most)"
        return (
            f"{model['class']}: {len(model['layers'])} layers x {model['heads']} heads of {model['head_dim']}\n"
            f"{frames} x {height} x {width}{text} = {self.tokens:,} tokens, tiles of {self.plan.tile[0]} x "
            f"{self.plan.tile[1]}, granularity {self.plan.granularity}"
        )

    def _legend(self):
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None)
        for name in ("", "pattern", "density", "share of heads"):
            table.add_column(name, justify="left" if name in ("", "pattern") else "right")
        symbols = symbols_of(self.plan.parsed())
        for i, (pattern, share) in enumerate(zip(self.plan.parsed(), self.shares(), strict=True)):
            if share:
                mark = Text(symbols[i], STYLES[pattern.name])
                table.add_row(mark, describe(pattern), f"{self.density[i]:.1%}", f"{share:.1%}")
        return table

    def _map(self, b: int):
        """One line a layer, one letter a head."""
        from rich.text import Text

        low, high = self.plan.bins[b : b + 2]
        mean = self.bin_means(self.density)[b]
        symbols, patterns = symbols_of(self.plan.parsed()), self.plan.parsed()
        text = Text(f"\nnoise {high:.3f} to {low:.3f} ({self.bin_weights[b]:.0%} of the steps), density {mean:.1%}")
        names = [name.rpartition(".")[0] for name in self.plan.layers]
        width = max(map(len, names))
        for name, ids in zip(names, self.plan.assign[b], strict=True):
            text.append(f"\n  {name:<{width}}  ")
            for i in ids:
                text.append(symbols[i], STYLES[patterns[i].name])
            text.append(f"  {sum(self.density[i] for i in ids) / len(ids):6.1%}")
        return text

    def _speed(self) -> str:
        mean, dense, lines = self.mean(self.density), self.attention_flops / 1e12, []
        lines.append(f"\nmean density {mean:.1%}: {dense * mean:,.1f} of {dense:,.1f} TFLOP of attention a pass")
        basis = "counting tiles" if self.costs == self.density else "by costs measured in the search"
        speedup = self.attention_speedup
        lines.append(f"predicted: attention {speedup:.2f}x as fast, {basis}" if speedup else "predicted: no attention")
        if self.model_speedup is not None:
            share = f"attention being {self.attention_share:.0%} of it"
            lines.append(f"predicted: transformer {self.model_speedup:.2f}x as fast, {share}")
        error = self.plan.search.get("error")
        if isinstance(error, dict) and error.get("mean") is not None:
            spread = f", {error['spread']:.2g} apart over prompts" if error.get("spread") is not None else ""
            lines.append(f"relative squared error of the searched heads in the search: {error['mean']:.3g}{spread}")
        if self.measured is None:
            lines.append("measured: not yet")
        else:
            m = self.measured
            bins = ", ".join(f"{ms:,.1f}" for ms in reversed(m["bins_ms"]))
            lines.append(
                f"measured: attention {m['speedup']:.2f}x as fast; dense {m['dense_ms']:,.1f} ms a pass, from noise to "
                f"clean {bins} ms ({m['device']}, {m['dtype'].removeprefix('torch.')})"
            )
        return "\n".join(lines)


def symbols_of(patterns: tuple[Pattern, ...]) -> list[str]:
    """A letter for each pattern: lower case for diagonals, upper case for multi-diagonals, digits for stripes."""
    seen: dict[str, int] = {}
    symbols = []
    for pattern in patterns:
        letters = SYMBOLS.get(pattern.name, STRIPES)
        symbols.append(letters[seen.get(pattern.name, 0) % len(letters)])
        seen[pattern.name] = seen.get(pattern.name, 0) + 1
    return symbols


def describe(pattern: Pattern) -> str:
    """A pattern in words."""
    fields = {key: value for key, value in pattern.to_dict().items() if key != "pattern" and value not in ([], None)}
    if not fields.get("blocks"):
        fields.pop("block_size", None)
    elif len(fields["blocks"]) > 8:
        fields["blocks"] = f"{len(fields['blocks'])} blocks"
    values = ", ".join(f"{key} {value}" for key, value in fields.items())
    return pattern.name.replace("_", "-") + (f" ({values})" if values else "")
