"""How does a worker of an ingest get what encodes the rows that it captures?"""

from collections.abc import Sequence

from actstore.ingest.encoding.plan import CodesPlan
from actstore.ingest.encoding.unit_codes import CodesWriter
from actstore.store import Store
from actstore.tokenization import Tokenization


def open_writers(
    store: Store, tokenization: Tokenization, plans: Sequence[CodesPlan], *, device: str
) -> list[CodesWriter]:
    """Return a writer for each of the codes, with its dictionary loaded on the device.

    Memory on the device: the encoders of all dictionaries, and a batch of pre-activations for each.

    Raises:
        NotFoundError: no such dictionary.
        FormatError: its weights are missing or damaged.
    """
    if not plans:
        return []
    from actstore.ingest.dictionaries.encoder import Encoder

    return [
        CodesWriter(
            store.storage,
            tokenization,
            plan,
            Encoder(
                store.dictionary(plan.dictionary),
                device=device,
                dtype=plan.settings.compute_dtype,
                value_dtype=plan.settings.value_dtype,
            ),
        )
        for plan in plans
    ]
