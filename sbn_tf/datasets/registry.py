"""Which datasets there are: the name of each, with its card and its reader."""

from collections.abc import Callable

from . import chest, isic, lidc, lidc_patches, medmnist, phantoms
from .base import TASKS, Card, Parts

# name: (card, reader). A reader takes (root, size, seed[, limit][, cache]) and options of its own by keyword, and
# gives `Parts`.
REGISTRY: dict[str, tuple[Card, Callable[..., Parts]]] = {
    card.name: (card, reader)
    for card, reader in (
        (phantoms.PHANTOM_CHEST, phantoms.load_phantom_chest),
        (phantoms.PHANTOM_LESION, phantoms.load_phantom_lesion),
        (phantoms.PHANTOM_NODULE, phantoms.load_phantom_nodule),
        (chest.NIH_CHEST, chest.load_nih_chest),
        (isic.ISIC2018, isic.load_isic2018),
        (lidc.LIDC, lidc.load_lidc),
        (lidc_patches.LIDC_PATCHES, lidc_patches.load_lidc_patches),
    )
}


def names() -> tuple[str, ...]:
    """Names that `load` and `card` take."""
    return (*REGISTRY, *medmnist.NAMES)


def register(card: Card, reader: Callable[..., Parts]) -> None:
    """Make a dataset known to `load`, `card` and `compare` under its card's name, in this process.

    Args:
        card: what it is; every reader of a table sees it.
        reader: takes (root, size, seed) and options of its own by keyword, and gives `Parts`; it is given `limit` and
            `cache` where it asks for them. `docs/extending.md` has an example of twenty lines.

    Raises:
        ValueError: no `Card`, no function, an unknown task, or a name that another dataset has.
    """
    if not isinstance(card, Card) or card.task not in TASKS:
        raise ValueError(f"Expected a Card with a task among {', '.join(TASKS)}. Received: {card!r}")
    if not callable(reader):
        raise ValueError(f"Expected a reader, a function of (root, size, seed). Received: {reader!r}")
    if card.name in names() and REGISTRY.get(card.name, (None,))[0] != card:
        raise ValueError(f"Expected a name that no dataset has. Received: {card.name!r}, of a dataset that is known.")
    REGISTRY[card.name] = (card, reader)


def registered(name: str) -> tuple[Card, Callable[..., Parts]] | None:
    """Card and reader of a name; None if no dataset has it."""
    return medmnist.registered(name) if name in medmnist.NAMES else REGISTRY.get(name)
