"""Errors that reach a person: each is one sentence, and says what to do next where there is something to do."""

from __future__ import annotations


class VMwrapperError(Exception):
    """Base of every error that we raise on purpose.

    `str(error)` is a sentence for the user: the cause and the place.
    `hint` is the next step, or empty when the sentence already says it.
    """

    def __init__(self, sentence: str, hint: str = "") -> None:
        super().__init__(sentence)
        self.hint = hint

    def explain(self) -> str:
        """The sentence and, on a second line, the next step."""
        return f"{self}\n  {self.hint}" if self.hint else str(self)


class ConfigError(VMwrapperError):
    """A setting, a file or a command line that cannot be used as it is."""


class ProtocolError(VMwrapperError):
    """A peer sent something that the protocol does not allow."""


class TransferError(VMwrapperError):
    """A copy that could not be completed."""
