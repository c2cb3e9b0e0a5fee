"""Reasoning that models write before an answer, between tags, told from the answer as the text comes.

<think>…</think>…      DeepSeek-R1, QwQ, Qwen3; some chat templates end with the opening tag
[THINK]…[/THINK]…      Magistral
"""

import regex  # unlike re, it knows what may still become a match

TAGS = {"<think>": "</think>", "[THINK]": "[/THINK]"}
MARKERS = (*TAGS, *TAGS.values())
OPEN = regex.compile(rf"\s*+(?P<tag>{'|'.join(map(regex.escape, TAGS))})")
OPEN_AT_END = regex.compile(rf"(?P<tag>{'|'.join(map(regex.escape, TAGS))})\s*+$")
CLOSE = {tag: regex.compile(rf"(?<!\s)\s*+{regex.escape(close)}") for tag, close in TAGS.items()}


def opened(prompt: str) -> str | None:
    """The tag that a prompt ends with, so that the answer begins within reasoning; None if it does not."""
    match = OPEN_AT_END.search(prompt)
    return match["tag"] if match else None


class ReasoningReader:
    """Tells reasoning at the beginning of an answer from what follows it.

    White space around the tags belongs to neither. Reasoning that is never closed is all there is.
    """

    def __init__(self, tag: str | None = None) -> None:
        """`tag`: the one that the prompt has opened."""
        self.tag = tag
        self.state = "start"  # then "begun" after the tag, "reasoning", "closed" after the other tag, "answer"
        self.rest = ""  # text that is not decided

    def push(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """What is new of the reasoning, and of the answer."""
        if self.state == "answer":
            return "", text
        self.rest += text
        reasoning = ""
        if self.state == "start":
            match = OPEN.match(self.rest, partial=True)
            if match is not None and match.partial and not last:
                return "", ""
            if match is not None and not match.partial:
                self.tag, self.rest = match["tag"], self.rest[match.end() :]
            self.state = "answer" if self.tag is None else "begun"
        if self.state == "begun":
            self.rest = self.rest.lstrip()
            self.state = "reasoning" if self.rest else "begun"
        if self.state == "reasoning":
            match = CLOSE[self.tag or ""].search(self.rest, partial=True)
            end = len(self.rest) if match is None or (match.partial and last) else match.start()
            reasoning, self.rest = self.rest[:end], self.rest[end:]
            if match is not None and not match.partial:
                self.state, self.rest = "closed", self.rest[match.end() - end :]
            reasoning = reasoning.rstrip() if last and self.state == "reasoning" else reasoning
        if self.state == "closed":
            self.rest = self.rest.lstrip()
            self.state = "answer" if self.rest else "closed"
        answer = ""
        if self.state == "answer":
            answer, self.rest = self.rest, ""
        return reasoning, answer
