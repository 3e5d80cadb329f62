"""Tokens and text from any language model (`lmx.models.protocol`), streamed or in one compiled loop.

`sampling` from a distribution to a token; `stopping` when a row ends; `request` what was asked for, checked;
`generate` tokens; `beam` the best of many hypotheses; `speculative` the same distribution in fewer steps, by `drafts`;
`rows` what they share; `scoring` how probable given texts are; `text` prompts as strings.
"""

from lmx.decode.beam import Beams, beam_search
from lmx.decode.drafts import Draft, ModelDraft, PromptLookup, Proposal
from lmx.decode.generate import Generated, generate, stream
from lmx.decode.sampling import Sampling
from lmx.decode.scoring import RollingScores, Scores, score_continuations, score_rolling
from lmx.decode.speculative import Speculated, speculate
from lmx.decode.text import generate_text, stream_text

__all__ = [
    "Beams",
    "Draft",
    "Generated",
    "ModelDraft",
    "PromptLookup",
    "Proposal",
    "RollingScores",
    "Sampling",
    "Scores",
    "Speculated",
    "beam_search",
    "generate",
    "generate_text",
    "score_continuations",
    "score_rolling",
    "speculate",
    "stream",
    "stream_text",
]
