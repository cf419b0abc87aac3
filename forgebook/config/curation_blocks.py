"""The blocks `curation` and `synthesis` of a config: what the commands curate and synthesize do; training reads none.

The endpoints that they ask have their settings here too. A key of an endpoint is never written into a config.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from forgebook.config.blocks import StrictBlock
from forgebook.config.data_block import DataPath
from forgebook.config.values import Float, Int, Positive
from forgebook.errors import shown_value

__all__ = [
    "REASONS", "CriticConfig", "CurationConfig", "EmbeddingsConfig", "EndpointConfig", "GradedAnswer",
    "SynthesisConfig",
]  # fmt: skip

# Why curate drops or reports an example, in the order in which the reasons are looked for.
REASONS = {
    "unusable": "the row is malformed or of no known format",
    "empty_answer": "an answer with fewer characters than min_answer_characters",
    "too_long": "more characters than max_characters",
    "truncated": "the last answer stops in the middle of a sentence, a list or a block of code",
    "refusal": "the answer refuses with a stock phrase",
    "exact_duplicate": "the same as an earlier example, but for spaces",
    "near_duplicate": "almost the same words as an earlier example",
    "validation_overlap": "the same question as a validation example, or almost the same words",
    "mixed_languages": "question and answer are in different scripts or languages",
    "personal_data": "an email address, a phone number, a card number or a key",
    "high_loss": "the tuned model finds the answer far less likely than the others",
    "low_score": "the critic's score is below the threshold",
}
Reason = Literal[
    "empty_answer", "too_long", "truncated", "refusal", "exact_duplicate", "near_duplicate",
    "validation_overlap", "mixed_languages", "personal_data", "high_loss", "low_score",
]  # fmt: skip
# Not these: a person decides about mixed languages and personal data, and a high loss may be a hard example.
DROPPED: tuple[Reason, ...] = (
    "empty_answer", "too_long", "truncated", "refusal", "exact_duplicate", "near_duplicate",
    "validation_overlap", "low_score",
)  # fmt: skip
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class EndpointConfig(StrictBlock):
    """A language model behind an OpenAI-compatible URL."""

    model: str
    """Name of the model, as the endpoint lists it."""
    base_url: str | None = None
    """URL up to `/v1`, as of `serve` or vLLM. None: the environment variable OPENAI_BASE_URL, else OpenAI's."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable with the API key. Not set: no key is sent, as local endpoints need none."""
    temperature: Annotated[Float, Field(ge=0)] | None = None
    """Sampling temperature. None: 0 for one vote, 0.7 for several and for a teacher."""
    max_tokens: Positive = 512
    """Longest reply, in tokens."""
    concurrency: Annotated[Positive, Field(le=256)] = 8
    """Requests at a time."""
    retries: Annotated[Int, Field(ge=0)] = 5
    """How often a request is repeated if the endpoint is busy or does not answer, after longer and longer waits."""
    timeout: Annotated[Float, Field(gt=0)] = 120
    """Seconds to wait for a reply."""
    usd_per_million_input_tokens: Annotated[Float, Field(ge=0)] | None = None
    """Price of the prompts, for the cost in the report."""
    usd_per_million_output_tokens: Annotated[Float, Field(ge=0)] | None = None
    """Price of the replies."""

    @field_validator("api_key_env")
    @classmethod
    def _names_a_variable(cls, name: str) -> str:
        if not _VARIABLE.fullmatch(name):  # the text is not shown: it may be the key itself
            raise ValueError("must be the name of an environment variable, such as OPENAI_API_KEY, and not the key")
        return name

    @field_validator("base_url")
    @classmethod
    def _is_a_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(f"got {shown_value(url)}, must start with http:// or https://")
        return url


class GradedAnswer(StrictBlock):
    """An answer with its score: an example for the critic."""

    question: str
    """What was asked."""
    answer: str
    """What was answered."""
    score: Int
    """Its score, on the scale of the rubric."""
    reason: str = ""
    """Why, in a sentence."""


class CriticConfig(EndpointConfig):
    """A language model that scores each answer."""

    rubric: str = (
        "5: right, complete and to the point\n4: right, with a small flaw\n3: partly right\n2: mostly wrong or beside "
        "the point\n1: wrong, empty, or not an answer"
    )
    """What each score means."""
    lowest: Int = 1
    """The lowest score of the rubric."""
    highest: Int = 5
    """The highest score of the rubric."""
    shots: list[GradedAnswer] = Field(default=[])
    """Graded answers that the critic sees before each question."""
    votes: Annotated[Positive, Field(le=32)] = 1
    """Replies per example; its score is their mean."""
    probabilities: bool = False
    """Score by the probabilities of all scores at the place of the reply's, not by the likeliest or a sampled one. Far
    finer with a small critic; the endpoint must return `logprobs`, as `serve` and vLLM do."""
    threshold: Float | None = None
    """Examples with a lower score are dropped. None: chosen on `labeled`, else the middle of the scale."""
    labeled: str | None = None
    """A file of examples in any format with a key `good`, true or false, set by a person: the threshold is chosen on
    it, and precision and recall of each are reported."""

    @model_validator(mode="after")
    def _is_a_scale(self) -> Self:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest: got {self.lowest}, must be less than highest, {self.highest}")
        if self.probabilities and not 0 <= self.lowest < self.highest <= 9:
            raise ValueError("probabilities: scores must be one digit each: set lowest and highest between 0 and 9")
        outside = [shot.score for shot in self.shots if not self.lowest <= shot.score <= self.highest]
        if outside:
            raise ValueError(f"shots: score {outside[0]} is not between {self.lowest} and {self.highest}")
        return self


class EmbeddingsConfig(StrictBlock):
    """Embeddings of the examples, by which near duplicates in other words are found: from one of three sources."""

    column: str | None = None
    """The key or column of the data that holds each row's embedding, a list of numbers."""
    file: str | None = None
    """A .npy or .parquet file with one embedding per row of train_path, in the order of its files."""
    validation_file: str | None = None
    """The same for valid_path. None: validation examples are compared by their words alone."""
    endpoint: EndpointConfig | None = None
    """An embedding model behind an OpenAI-compatible URL (`/v1/embeddings`)."""
    similarity: Annotated[Float, Field(ge=0.5, le=1)] = 0.95
    """Cosine similarity from which examples are near duplicates. It depends on the model: look at the report."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        given = [name for name in ("column", "file", "endpoint") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"got {' and '.join(given) or 'none'}, needs one of column, file and endpoint")
        if self.validation_file is not None and self.file is None:
            raise ValueError("validation_file: is for embeddings from a file; set file, too")
        return self


class CurationConfig(StrictBlock):
    """What curate drops, and how it decides."""

    drop: list[Reason] = Field(default=list(DROPPED))
    """Reasons for which an example is left out of the new file; examples of all other reasons are only reported."""
    similarity: Annotated[Float, Field(ge=0.3, le=1)] = 0.8
    """Near duplicates share at least this part of their pairs of adjacent words (Jaccard). Examples that differ in a
    number, the system message or a short last answer are never near duplicates."""
    embeddings: EmbeddingsConfig | None = None
    """Embeddings by which examples are near duplicates, too. None: by their words alone."""
    min_answer_characters: Annotated[Int, Field(ge=0)] = 1
    """Fewest letters and digits of an answer."""
    max_characters: Positive | None = None
    """Most characters of an example. None: any number."""
    refusals: list[str] = Field(default=[])
    """More regular expressions of refusals, searched for at the start of an answer, in any case."""
    loss_deviations: Annotated[Float, Field(gt=0)] = 4.0
    """A loss counts as high this many robust standard deviations above the median of all examples."""
    examples_per_reason: Positive = 20
    """Examples per reason in the report."""
    critic: CriticConfig | None = None
    """The language model that scores the answers. None: no critic."""

    @field_validator("refusals")
    @classmethod
    def _are_expressions(cls, expressions: list[str]) -> list[str]:
        for expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{shown_value(expression)} is no regular expression: {error}") from None
        return expressions


class SynthesisConfig(StrictBlock):
    """What synthesize writes, and which examples it accepts."""

    teacher: EndpointConfig
    """The language model that writes."""
    count: Positive = 100
    """Examples to accept."""
    write: Literal["examples", "answers"] = "examples"
    """examples: new questions with answers, like some seeds. answers: new answers to the questions of the seeds."""
    prompt: str | None = None
    """What the teacher is asked. examples: `{seeds}` stands for some seed examples as JSON lines. answers: `{question}`
    stands for the question. None: a general prompt, or the question alone."""
    seeds: DataPath | None = None
    """Seed examples. None: those of train_path."""
    seeds_per_request: Positive = 3
    """examples: seeds shown in a request; a random choice each time."""
    samples: Positive = 4
    """answers: replies per question, of which the first accepted one is used."""
    max_requests: Positive | None = None
    """Most requests. None: 20 times `count`."""
    json_schema: dict[str, Any] | None = None
    """A JSON schema that the last answer must satisfy, read as JSON."""
    exact_match: str | None = None
    """answers: a regular expression whose last group, or whole match, is the final answer; it must be that of the
    seed. `.+` compares the whole text."""
    verifier: str | None = None
    """A Python function that accepts an example: `FILE.py:NAME`, called with {"messages": [...]}; it returns true or
    false, or a text with the reason to reject."""
    workers: Annotated[Int, Field(ge=0)] | None = None
    """Workers of the Ray cluster that send the requests, by Ray Data, each `concurrency` at a time. 0: this process.
    None: 0, and from 10,000 requests on as many as the cluster has cores, at most 8."""
    seed: Int = 0
    """Another seed shows the teacher other examples."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.exact_match is not None:
            if self.write != "answers":
                raise ValueError("exact_match: needs write: answers, where the seed's own answer is known")
            try:
                re.compile(self.exact_match)
            except re.error as error:
                raise ValueError(f"exact_match: no regular expression: {error}") from None
        field = {"examples": "{seeds}", "answers": "{question}"}[self.write]
        if self.prompt is not None and field not in self.prompt:
            raise ValueError(f"prompt: must contain {field} with write: {self.write}")
        if self.verifier is not None and not re.fullmatch(r".+\.py:[A-Za-z_]\w*", self.verifier):
            raise ValueError(f"verifier: got {shown_value(self.verifier)}, must be FILE.py:NAME")
        return self
