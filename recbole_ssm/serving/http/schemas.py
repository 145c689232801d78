"""What requests and answers look like; OpenAPI's document is made of it."""

from typing import Annotated, Any

from fastapi import Path, Query
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator

MOST = 1000  # recommendations
ITEMS = 1000  # events of a request: each of them takes a step of the model

Item = Annotated[Annotated[StrictStr, Field(max_length=1000)] | StrictInt, Field(description="An item's token.")]
Time = Annotated[float, Field(ge=-1e18, le=1e18, allow_inf_nan=False, strict=True)]
K = Annotated[int, Field(ge=1, le=MOST, strict=True, description="Most recommendations.")]
SessionId = Annotated[
    str, Path(pattern=r"^[A-Za-z0-9_.:-]{1,128}$", description="A name of the client's choice, such as a random one.")
]
KQuery = Annotated[int, Query(ge=1, le=MOST, description="Most recommendations.")]
AtQuery = Annotated[
    float | None,
    Query(ge=-1e18, le=1e18, allow_inf_nan=False, description="When it is asked, for models with request_time: known."),
]
SEEN = "Whether the history's own items are left out; a model with allow_repeats: False does so in any case."
SeenQuery = Annotated[bool, Query(description=SEEN)]


class Given(BaseModel):
    """Items in the order of time."""

    model_config = ConfigDict(extra="forbid")

    items: list[Item] = Field(min_length=1, description="Tokens, oldest first; unknown ones are left out and listed.")
    times: list[Time] | None = Field(None, description="Of each item, for models that read times.")
    at: Time | None = Field(
        None, description="When recommendations are asked for, for models that read it (request_time: known)."
    )

    @model_validator(mode="after")
    def _fit(self) -> "Given":
        if self.times is not None and len(self.times) != len(self.items):
            raise ValueError("there are to be as many times as items")
        return self

    @property
    def tokens(self) -> list[str]:
        """Numbers stand for their decimal form."""
        return [str(item) for item in self.items]


class RecommendRequest(Given):
    """A history, and what is to be recommended after it."""

    k: K = 10
    exclude_seen: bool = Field(True, description=SEEN, strict=True)
    candidates: list[Item] | None = Field(None, description="Items to choose from; all where absent.")


class EventsRequest(Given):
    """Events of a session."""

    items: list[Item] = Field(min_length=1, max_length=ITEMS, description=Given.model_fields["items"].description)
    after: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None,
        description="Number of events that the session has so far, else the request is refused: so that one whose "
        "answer was lost can be sent again without being counted twice.",
    )
    k: K | None = Field(None, description="Recommendations after these events, if any are wanted.")
    exclude_seen: bool = Field(True, description=SEEN, strict=True)

    @model_validator(mode="after")
    def _asks(self) -> "EventsRequest":
        if self.at is not None and self.k is None:
            raise ValueError("at is of recommendations: give k, too")
        return self


class Recommended(BaseModel):
    """An item."""

    item: str
    score: float = Field(description="Higher is better; scores of different histories do not compare.")
    title: str | None = None


class RecommendAnswer(BaseModel):
    """Best first."""

    recommendations: list[Recommended]
    unknown: list[str] = Field(description="Items of the request that the model does not know.")


class SessionAnswer(BaseModel):
    """A session."""

    events: int = Field(description="How many it has.")
    recommendations: list[Recommended] | None = Field(None, description="Best first, where they were asked for.")
    unknown: list[str] = Field(description="Items of the request that the model does not know.")


class SimilarAnswer(BaseModel):
    """Items whose embeddings have the largest cosine with that of the one asked about."""

    similar: list[Recommended]


class Named(BaseModel):
    """An item that the model knows."""

    item: str
    title: str | None = None


class ItemsAnswer(BaseModel):
    """Items that were found."""

    items: list[Named]


class Health(BaseModel):
    """The server runs, and its store of sessions answers."""

    status: str
    model: str
    items: int
    digest: str = Field(description="Of the model: which one this is.")


class Error(BaseModel):
    """What went wrong."""

    type: str = Field(description="A word for programs.")
    message: str = Field(description="A sentence for people.")


class Failure(BaseModel):
    """Every answer but those of status 200."""

    error: Error


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Of FastAPI's ``responses``: errors that a route may answer."""
    return {status: {"model": Failure} for status in sorted({400, 401, 408, 413, 422, 503, *statuses})}
