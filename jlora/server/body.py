"""Request bodies in general: JSON bytes -> a checked pydantic object, or a ParameterError that names
the field. An unknown field, and an unsupported one with a value that matters, is an error; null is
what OpenAI's and vLLM's clients send for a field that they leave out.
"""

from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticUseDefault

from jlora.errors import ParameterError
from jlora.near import near

TBody = TypeVar("TBody", bound="Body")


class Body(BaseModel):
    """A JSON object of which every key is known."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Field -> the values that change nothing; any other value is refused."""

    NULL_COUNTS: ClassVar[frozenset[str]] = frozenset()
    """Fields where null says something else than leaving the field out."""

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        if (
            value is None
            and name not in cls.NULL_COUNTS
            and not cls.model_fields[name].is_required()
        ):
            raise PydanticUseDefault
        return value


def parse_body(cls: type[TBody], data: bytes) -> TBody:
    """The checked body; ParameterError names the first field that is wrong."""
    try:
        body = cls.model_validate_json(data)
    except ValidationError as error:
        raise _explain(cls, error) from None
    for name, harmless in cls.UNSUPPORTED.items():
        value = getattr(body, name)
        if value is not None and value not in harmless:
            raise ParameterError(
                f"{name} is not supported by this server; leave it out (got {str(value)[:80]})",
                name,
            )
    return body


def _explain(cls: type[Body], error: ValidationError) -> ParameterError:
    problem = error.errors(include_url=False, include_context=False)[0]
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    names, holder = _place(cls, problem["loc"])
    where = ".".join(names)
    if kind == "json_invalid":
        return ParameterError(
            f"the body is not valid JSON: {message.removeprefix('Invalid JSON: ')}"
        )
    if kind == "model_type":
        return ParameterError(f"{where or 'the body'}: a JSON object was expected", where or None)
    if kind == "extra_forbidden":
        unknown = str(problem["loc"][-1])
        where = ".".join((*names, unknown))
        hint = near(unknown, holder.model_fields) or "check its spelling"
        return ParameterError(f"unknown field {where!r}: {hint}", where)
    if kind == "missing":
        return ParameterError(f"the field {where!r} is required", where)
    got = "" if problem["loc"] == () else f" (got {str(problem['input'])[:80]!r})"
    return ParameterError(f"{where}: {message}{got}", names[0] if names else None)


def _place(cls: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel]]:
    """The fields and indices of a location, without pydantic's names for the members of a union, and
    the object that holds the last of them."""
    names, holder = [], cls
    for part in loc:
        if isinstance(part, int):
            names.append(str(part))
        elif part in holder.model_fields:
            names.append(part)
            holder = _model_in(holder.model_fields[part].annotation) or holder
    return names, holder


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The object type in an annotation such as `list[Message] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
