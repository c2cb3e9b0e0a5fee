"""Errors in OpenAI's form, and the translation of the library's error messages into a client's field names."""

import re
from dataclasses import KW_ONLY, dataclass
from typing import Any

from fastgen.sampling_params import SamplingParams

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
FIRST_WORD = re.compile(r"\w*")
CONTEXT_OVERFLOW_MESSAGE = re.compile(r"\d+ prompt tokens and max_tokens=")  # start of the message of `max_length`


@dataclass(eq=False)
class APIError(Exception):
    """An error that answers a request in OpenAI's form. `param` names the invalid field."""

    status: int
    message: str
    _: KW_ONLY
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None  # seconds

    def __str__(self) -> str:
        return self.message

    def to_body(self) -> dict[str, Any]:
        """Returns the JSON of the response's body."""
        error_type = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": error_type, "param": self.param, "code": self.code}}


def bad_request(message: str, field_names: dict[str, str] | None = None) -> APIError:
    """Makes the 400 for an error message of the library, whose first word is the name of the field.

    `field_names` maps the library's field names to the client's. Only the first word is renamed, since the remaining
    message may quote the client.
    """
    message, field_names = message.removeprefix("SamplingParams."), field_names or {}
    is_overflow = CONTEXT_OVERFLOW_MESSAGE.match(message)  # contains numbers and field names only
    library_name = "max_tokens" if is_overflow else FIRST_WORD.match(message)[0]  # type: ignore[index]
    name = field_names.get(library_name, library_name)
    message = message.replace(library_name, name, -1 if is_overflow else 1)
    known_names = (*SamplingParams.__dataclass_fields__, *field_names.values(), "prompt")
    return APIError(400, message, param=name if name in known_names else None)
