"""`droidspeak store shared`: what models got from each other's caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from droidspeak.connector.reports import Pair, pairs_of
from droidspeak.integrations.cli.output import Format, FormatOption, note, show_rows, show_table
from droidspeak.integrations.cli.store.names import short
from droidspeak.integrations.cli.store.reported import fail, reports_in
from droidspeak.integrations.cli.store.showing import size_text
from droidspeak.integrations.cli.store.target import ConfigOption, StoreOption, open_target

__all__ = ["shared"]

_TOTAL = "to others"


class By(StrEnum):
    """What the table counts."""

    TOKENS = "tokens"
    BYTES = "bytes"


# Short: a title is folded to the width of its table.
_TITLES = {By.TOKENS: "Tokens saved", By.BYTES: "Bytes saved"}


def shared(
    by: Annotated[By, typer.Option(help="What the table counts; JSON has both.")] = By.TOKENS,
    store: StoreOption = None,
    config: ConfigOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Show what each model saved by each model's caches: a matrix, sender by receiver."""
    with open_target(store, config, tolerant=True) as target:
        reports, failed = reports_in(target)
        pairs, names = pairs_of(reports), target.names
    if format is Format.TABLE:
        _show(pairs, by, names)
    elif format is Format.QUIET:
        for pair in pairs:
            print(pair.sender, pair.receiver)
    else:
        show_rows(format, _rows(pairs, names), (), name="pairs")
    fail(failed)


def _rows(pairs: Sequence[Pair], names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        figures = pair.model_dump(exclude={"sender", "receiver"})
        yield {
            "sender": pair.sender,
            "sender_model": names.get(pair.sender),
            "receiver": pair.receiver,
            "receiver_model": names.get(pair.receiver),
            **figures,
        }


def _show(pairs: Sequence[Pair], by: By, names: Mapping[str, str]) -> None:
    if not pairs:
        note("no engine has told of a hit yet; they do so every few seconds while they have requests")
        return
    cells = {(pair.sender, pair.receiver): pair for pair in pairs}
    senders, receivers = _models(pairs, "sender"), _models(pairs, "receiver")
    rows = []
    for sender in senders:
        others = [cells[pair] for pair in cells if pair[0] == sender and pair[1] != sender]
        row = [_cell(cells.get((sender, receiver)), by) for receiver in receivers]
        total = sum(_saved(pair, by) for pair in others)
        rows.append([short(sender, names), *row, _text(total, by) if others else "-"])
    show_table(_TITLES[by], ["from, to:", *(short(model, names) for model in receivers), _TOTAL], rows)


def _models(pairs: Sequence[Pair], side: str) -> list[str]:
    """Those with the most tokens first."""
    tokens: dict[str, int] = {}
    for pair in pairs:
        model = getattr(pair, side)
        tokens[model] = tokens.get(model, 0) + pair.tokens
    return sorted(tokens, key=lambda model: (-tokens[model], model))


def _cell(pair: Pair | None, by: By) -> str:
    # What a model has from its own cache, it had to store.
    if pair is None or (by is By.BYTES and pair.sender == pair.receiver):
        return "-"
    return _text(_saved(pair, by), by)


def _saved(pair: Pair, by: By) -> float:
    return pair.tokens_saved if by is By.TOKENS else pair.bytes_unstored


def _text(value: float, by: By) -> str:
    return f"{value:,.0f}" if by is By.TOKENS else size_text(int(value))
