"""How is the context of a token told? Its columns, and how many tokens may be shown.

Contexts are cut when they are asked for: the tokens before and after, as many as wanted, never past the edge of the model
window that computed the activation. The text is that of the document itself. They are made by `actstore.query.row_contexts`.
"""

import numpy as np
import pyarrow as pa

from actstore.errors import ErrorKind, InvalidInputError

MAX_CONTEXT = 4096
"""Most tokens shown on either side."""

CONTEXT_TYPE = pa.struct(
    [
        pa.field("text", pa.string()),
        pa.field("token_start", pa.int32()),
        pa.field("token_end", pa.int32()),
        pa.field("tokens", pa.list_(pa.string())),
        pa.field("token_index", pa.int32()),
        pa.field("values", pa.list_(pa.float64())),
    ]
)
"""`text[token_start:token_end]` is the token (code points); `tokens[token_index]` too, `values[token_index]` its value. The
value of a token whose row is not stored is null."""


def check_context(before: int, after: int) -> None:
    """Check how many tokens to show.

    Raises:
        InvalidInputError: not whole numbers from 0 to `MAX_CONTEXT`.
    """
    for name, value in (("before", before), ("after", after)):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or not 0 <= value <= MAX_CONTEXT:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"{name} must be a whole number of tokens from 0 to {MAX_CONTEXT}, got {value!r}",
            )
