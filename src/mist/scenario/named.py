"""Sections of a scenario: pydantic models with errors for people, and specs that name a registered implementation.

Between the registry, whose dataclasses are their own parameter lists, and the schema, which places them in a scenario:
validation and JSON Schema of a policy come from the fields of its dataclass. It never holds an instance of a policy.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PydanticSchemaGenerationError,
    Strict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from mist import registry
from mist.errors import Problem, nearest
from mist.scenario.field_docs import field_docs

#: what a kind of the registry is called in a sentence
NOUNS = {
    "arrivals": "arrival process", "lengths": "length distribution", "trace": "trace format", "pipeline": "pipeline",
    "batching": "batching policy", "order": "order", "routing": "routing policy",
    "admission": "admission policy", "perf": "performance model", "eviction": "eviction policy",
}  # fmt: skip

_PLAIN = (int, float, str, bool, type(None))


#: a problem and its location below the value that is being validated
Located = tuple[tuple[str | int, ...], Problem]


class Section(BaseModel):
    """A mapping of a scenario: frozen, typed strictly, no foreign keys; the docstrings of its fields are their help."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _say_it_plainly(cls, data: Any, handler: ModelWrapValidatorHandler[Any], info: ValidationInfo) -> Any:
        try:
            section = handler(data)
        except ValidationError as error:
            found = [_in_words(e, cls) for e in error.errors()]
            if isinstance(data, dict) and {e["type"] for e in error.errors()} == {"extra_forbidden"}:
                # only keys that don't exist: what the checks of the whole say of the rest is worth telling too
                known = {key: value for key, value in data.items() if key in cls.model_fields}
                try:
                    cls.model_validate(known, context=info.context)
                except ValidationError as rest:
                    found += [_in_words(e, cls) for e in rest.errors()]
            else:
                found += cls._conflict_details(data)
            raise ValidationError.from_exception_data(cls.__name__, found) from None
        if details := cls._conflict_details(data):
            raise ValidationError.from_exception_data(cls.__name__, details)
        return section

    @classmethod
    def help_of(cls, name: str) -> str:
        """What the field `name` is for, by the docstring below it; "" where it has none."""
        sections = (base for base in cls.__mro__ if issubclass(base, Section))
        return next((docs[name] for docs in map(field_docs, sections) if name in docs), "")

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        whole = handler(schema)
        for name, field in handler.resolve_ref_schema(whole).get("properties", {}).items():
            if help_text := cls.help_of(name):
                field["description"] = help_text
        return whole

    @classmethod
    def conflicts(cls, given: Set[str]) -> Iterator[Located]:
        """Keys that don't go together or need others, whatever their values; `given` are those that have a value."""
        return iter(())

    @classmethod
    def _conflict_details(cls, data: Any) -> list[InitErrorDetails]:
        given = {key for key, value in data.items() if value is not None} if isinstance(data, dict) else set()
        found = cls.conflicts(given) if isinstance(data, dict) else ()
        return [_details(p.message, p.hint, loc, None) for loc, p in found]


def problem(message: str, hint: str = "", loc: tuple[str | int, ...] = (), *, key: bool = False) -> ValidationError:
    """An exception for validators to raise: `message` and `hint` at `loc` below the value that is being validated."""
    return ValidationError.from_exception_data("scenario", [_details(message, hint, loc, None, key)])


def problems(found: Iterable[Located]) -> ValidationError:
    """An exception for validators to raise: problems at locations below the value; those with a file stay there."""
    details = [
        _details(p.message, p.hint, loc, None, place=(p.file, p.line, p.column) if p.file else None) for loc, p in found
    ]
    return ValidationError.from_exception_data("scenario", details)


@dataclass(frozen=True, slots=True)
class Spec:
    """An implementation by name: a value with every parameter in it, out of which each run builds a fresh instance.

    `given` are the names of the parameters that the user wrote; the others are defaults.
    """

    kind: str
    name: str
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    given: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """As a line of text has it."""
        return f"{self.name} ({', '.join(f'{k} {v}' for k, v in self.params.items())})" if self.params else self.name

    def build(self) -> Any:
        """A fresh instance of the class registered under this kind and name."""
        built = {key: value.build() if isinstance(value, Spec) else value for key, value in self.params.items()}
        return registry.lookup(self.kind, self.name)(**built)

    def refused(self, loc: tuple[str, ...] = ()) -> list[Located]:
        """Why the implementation refuses these parameters: no problem, or one at `loc` or the parameter below it."""
        try:
            self.build()
        except (ValueError, ArithmeticError) as error:
            words = re.findall(r"\w+", str(error))
            named = tuple(words[:1]) if words and words[0] in self.params else ()
            return [((*loc, *named), Problem(str(error), hint=_help(parameters(self.kind, self.name))))]
        return []

    def plain(self) -> dict[str, Any]:
        """`{name: parameters}` as plain data, which reads back as this spec."""
        return {self.name: parameters(self.kind, self.name)(**self.params).model_dump(mode="json")}

    def with_defaults(self, **values: Any) -> Spec:
        """This spec with `values` for those of its parameters that the user left to their defaults."""
        own = parameters(self.kind, self.name).model_fields
        fill = {key: value for key, value in values.items() if key in own and key not in self.given}
        return dataclasses.replace(self, params={**self.params, **fill})


@dataclass(frozen=True, slots=True)
class SpecOf:
    """Marks a field as naming an implementation of `kind`: `name`, `{name: parameters}`, `{name: only parameter}`.

    `bare` is the implementation that a plain number (`bare_type` "number") or list ("array") stands for. With `only`
    the value is the parameters of that implementation. `unchecked` leaves its own checks to a later `Spec.refused`.
    """

    kind: str
    bare: str = ""
    bare_type: str = "number"
    only: str = ""
    unchecked: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(Spec.plain)
        return core_schema.no_info_plain_validator_function(self.read, serialization=dump)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        if self.only:
            return handler(parameters(self.kind, self.only).__pydantic_core_schema__)
        names = registry.names(self.kind)
        choices: list[dict[str, Any]] = [{"enum": names}]
        for name in names:
            inner = handler(parameters(self.kind, name).__pydantic_core_schema__)
            choices.append({"type": "object", "properties": {name: _or_bare(self.kind, name, inner)},
                            "required": [name], "additionalProperties": False})  # fmt: skip
        if self.bare:
            choices.append({"type": self.bare_type})
        return {"anyOf": choices}

    def read(self, value: Any) -> Spec:
        """The spec that `value` means; a ValidationError of all that is wrong with it."""
        if isinstance(value, Spec):
            return value
        if self.only:
            return self._read(self.only, value, ())
        if isinstance(value, str):
            value = {value: {}}
        elif self.bare and _is_a(self.bare_type, value):
            return self._read(self.bare, value, ())
        if not isinstance(value, dict) or len(value) != 1:
            known = f"known: {', '.join(registry.names(self.kind))}"
            article = "an" if NOUNS[self.kind][0] in "aeo" else "a"
            message = f"must be {article} {NOUNS[self.kind]} by name, or as {{name: parameters}}, not {short(value)}"
            raise problem(message, known)
        ((name, params),) = value.items()
        if name not in registry.names(self.kind):
            message = f"there is no {NOUNS[self.kind]} {name!r}"
            raise problem(message, nearest(name, registry.names(self.kind)), (name,), key=True)
        return self._read(name, params, (name,))

    def _read(self, name: str, params: Any, loc: tuple[str, ...]) -> Spec:
        model = parameters(self.kind, name)
        params = {} if params is None else params
        if not isinstance(params, dict):
            bare = _bare_parameter(model)
            if bare is None:
                raise problem(f"the parameters of {name} must be a mapping, not {short(params)}", _help(model), loc)
            params = {bare: params}
        try:
            read = model.model_validate(params)
        except ValidationError as error:
            bad = {e["loc"][:1] for e in error.errors()}
            rest = {key: value for key, value in params.items() if (key,) not in bad and key in model.model_fields}
            raise _below(loc, error, self._certainly_refused(name, rest, loc)) from None
        spec = Spec(self.kind, name, {key: getattr(read, key) for key in model.model_fields}, frozenset(params))
        if found := self._certainly_refused(name, params, loc) if self.unchecked else spec.refused(loc):
            raise problems(found)
        return spec

    def _certainly_refused(self, name: str, params: dict[str, Any], loc: tuple[str, ...]) -> list[Located]:
        """What the implementation refuses whatever the parameters are that aren't in `params`."""
        model = parameters(self.kind, name)
        try:
            read = model.model_validate(params)
        except ValidationError:
            return []
        spec = Spec(self.kind, name, {key: getattr(read, key) for key in model.model_fields}, frozenset(params))
        own = set(model.model_fields)
        told = [(each, own.intersection(re.findall(r"\w+", each[1].message))) for each in spec.refused(loc)]
        return [each for each, concerned in told if concerned and concerned <= spec.given]


@dataclass(frozen=True, slots=True)
class Short:
    """Marks a list or mapping that may be written short, as a single value; `convert` makes it whole."""

    convert: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.convert, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        whole = handler(schema)
        return {"anyOf": [whole, whole["items" if whole["type"] == "array" else "additionalProperties"]]}


@functools.cache
def _cached_parameters(kind: str, implementation: Any) -> type[Section]:
    if not dataclasses.is_dataclass(implementation):
        return create_model(f"{kind}_parameters", __base__=Section)
    hints = get_type_hints(implementation, include_extras=True)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(implementation):
        hint = _of_the_user(hints[field.name]) if field.init else None
        if hint is not None:
            fields[field.name] = (hint, _default(field, hint))
    name, doc = str(getattr(implementation, "__name__", kind)), (implementation.__doc__ or "").strip()
    model: type[Section] = create_model(name, __base__=Section, __doc__=doc, **fields)
    return model


def parameters(kind: str, name: str) -> type[Section]:
    """The model of a registered implementation's parameters: the init fields of its dataclass that are plain data."""
    return _cached_parameters(kind, registry.lookup(kind, name))


def _of_the_user(hint: Any) -> Any:
    """`hint` as pydantic should read it from a scenario; None where it isn't plain data, hence not the user's."""
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, registry.Named):
            return Annotated[Spec, SpecOf(mark.kind, bare=mark.bare)]
    hint = _lenient(hint)
    try:
        TypeAdapter(hint)
    except (PydanticSchemaGenerationError, TypeError):
        return None
    return hint


def _lenient(hint: Any) -> Any:
    """Tuples and sets are written as lists; everything else stays strict."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (None, Annotated, Literal):
        return hint
    inner = tuple(arg if arg is ... else _lenient(arg) for arg in args)
    if origin in (Union, UnionType):
        return Union[inner]  # noqa: UP007
    return Annotated[origin[inner], Strict(False)] if origin in (tuple, set, frozenset) else origin[inner]


def _default(field: dataclasses.Field[Any], hint: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return Field(field.default, validate_default=True) if get_origin(hint) is Annotated else field.default
    if name := registry.name_of(field.default_factory):
        return Field(default=name, validate_default=True)
    if field.default_factory is not dataclasses.MISSING:
        return Field(default_factory=field.default_factory)
    return ...


def _bare_parameter(model: type[Section]) -> str | None:
    """The parameter that a value without a name stands for: the only required one, or the only one."""
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    for names in (required, list(model.model_fields)):
        if len(names) == 1:
            return names[0]
    return None


def _or_bare(kind: str, name: str, schema: dict[str, Any]) -> dict[str, Any]:
    choices: list[dict[str, Any]] = [schema]
    if _bare_parameter(parameters(kind, name)):
        choices.append({"not": {"type": "object"}})
    elif not any(field.is_required() for field in parameters(kind, name).model_fields.values()):
        choices.append({"type": "null"})
    return {"anyOf": choices} if len(choices) > 1 else schema


def _is_a(json_type: str, value: Any) -> bool:
    if json_type == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, list)


def _below(loc: tuple[str, ...], error: ValidationError, more: Iterable[Located]) -> ValidationError:
    """The problems of `error`, at `loc` and below, and `more`."""
    details = [
        InitErrorDetails(
            type=PydanticCustomError("mist", "{message}", e["ctx"]), loc=(*loc, *e["loc"]), input=e["input"]
        )
        for e in error.errors()
    ]
    details += [_details(p.message, p.hint, where, None) for where, p in more]
    return ValidationError.from_exception_data("scenario", details)


def _help(model: type[Section]) -> str:
    described = any(map(model.help_of, model.model_fields))
    names = ", ".join(name if described else _field_in_words(model, name) for name in model.model_fields)
    return f"its keys: {names}" if names else "it takes no parameters"


_WANTED: dict[str, str | Callable[[dict[str, Any]], str]] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "greater_than": lambda ctx: f"greater than {ctx['gt']:g}",
    "greater_than_equal": lambda ctx: f"at least {ctx['ge']:g}",
    "less_than": lambda ctx: f"less than {ctx['lt']:g}",
    "less_than_equal": lambda ctx: f"at most {ctx['le']:g}",
    "literal_error": lambda ctx: f"one of {ctx['expected']}",
    "too_short": "a list or mapping with something in it",
    "string_too_short": "text with something in it",
    "string_too_long": lambda ctx: f"text of at most {ctx['max_length']} characters",
}


def _in_words(error: Any, model: type[Section]) -> InitErrorDetails:
    """A pydantic error as a message and a hint; the hint says what the nearest field of `model` is for."""
    loc, given, kind = error["loc"], error["input"], error["type"]
    if kind == "mist":
        ctx = error["ctx"]
        return _details(ctx["message"], ctx["hint"] or _hint(model, loc), loc, given, ctx["key"], ctx["place"])
    if kind == "extra_forbidden" and len(loc) == 1:
        hint = _elsewhere(model, str(loc[0])) or nearest(str(loc[0]), model.model_fields)
        return _details(f"there is no key {loc[0]!r} here", hint, loc, given, True)
    if kind == "missing" and len(loc) == 1:
        return _details(f"the key {loc[0]!r} is missing", _hint(model, loc), loc, given)
    wanted = _WANTED.get(kind)
    if wanted is None:
        message = str(error["msg"])
        message = message.removeprefix("Value error, ").removeprefix("Input ")
    else:
        ctx = error.get("ctx", {})
        message = f"must be {wanted(ctx) if callable(wanted) else wanted}, not {short(given)}"
    # the message has the choices, which is all that is known of a parameter
    says_all = kind == "literal_error" and bool(loc) and not model.model_fields[str(loc[0])].description
    return _details(message, "" if says_all else _hint(model, loc), loc, given)


def _elsewhere(model: type[Section], key: str) -> str:
    """Where below `model` a key does belong: to a section, or to an implementation that is named there; or ""."""
    for name, field in model.model_fields.items():
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, Section) and key in inner.model_fields:
                return f"it is a key of {name}: {{{key}: ...}}"
        for kind in (mark.kind for mark in field.metadata if isinstance(mark, SpecOf)):
            for each in registry.names(kind):
                if key in parameters(kind, each).model_fields:
                    return f"it is a key of a {NOUNS[kind]}: {name}: {{{each}: {{{key}: ...}}}}"
    return ""


def _details(
    message: str,
    hint: str,
    loc: tuple[str | int, ...],
    given: Any,
    key: bool = False,
    place: tuple[str, int, int] | None = None,
) -> InitErrorDetails:
    context = {"message": message, "hint": hint, "key": key, "place": place}
    return InitErrorDetails(type=PydanticCustomError("mist", "{message}", context), loc=loc, input=given)


def _hint(model: type[Section], loc: tuple[str | int, ...]) -> str:
    name = str(loc[0]) if loc else ""
    return _field_in_words(model, name) if name in model.model_fields and model.help_of(name) else _help(model)


def _field_in_words(model: type[Section], name: str) -> str:
    field = model.model_fields[name]
    text = f"{name}: {help_text}" if (help_text := model.help_of(name)) else name
    if field.is_required() and get_origin(field.annotation) is Literal:
        text += f" (one of {', '.join(map(str, get_args(field.annotation)))})"
    plain = isinstance(field.default, _PLAIN) and not field.is_required() and field.default is not None
    return f"{text} (default {short(field.default)})" if plain else text


def short(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, dict | list):
        return f"{'a mapping' if isinstance(value, dict) else 'a list'}" if value else "an empty one"
    words: dict[Any, str] = {None: "nothing", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
