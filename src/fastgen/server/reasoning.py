"""Reasoning that models write before an answer, between tags, told from the answer as the text comes.

<think>…</think>…      DeepSeek-R1, QwQ, Qwen3; some chat templates end with the opening tag
[THINK]…[/THINK]…      Magistral
"""

import regex  # unlike re, it knows what may still become a match

TAGS = {"<think>": "</think>", "[THINK]": "[/THINK]"}
MARKERS = (*TAGS, *TAGS.values())
OPENING_TAG = regex.compile(rf"\s*+(?P<tag>{'|'.join(map(regex.escape, TAGS))})")
OPENING_TAG_AT_END = regex.compile(rf"(?P<tag>{'|'.join(map(regex.escape, TAGS))})\s*+$")
CLOSING_TAG = {tag: regex.compile(rf"(?<!\s)\s*+{regex.escape(close)}") for tag, close in TAGS.items()}


def find_open_tag(prompt: str) -> str | None:
    """The tag that a prompt ends with, so that the answer begins within reasoning; None if it does not."""
    match = OPENING_TAG_AT_END.search(prompt)
    return match["tag"] if match else None


class ReasoningParser:
    """Tells reasoning at the beginning of an answer from what follows it.

    White space around the tags belongs to neither. Reasoning that is never closed is all there is.
    """

    def __init__(self, tag: str | None = None) -> None:
        """`tag`: the one that the prompt has opened."""
        self.tag = tag
        self.state = "start"  # then "begun" after the tag, "reasoning", "closed" after the other tag, "answer"
        self.undecided_text = ""  # text that is not decided

    def push(self, text: str, *, is_final: bool = False) -> tuple[str, str]:
        """What is new of the reasoning, and of the answer."""
        if self.state == "answer":
            return "", text
        self.undecided_text += text
        reasoning = ""
        if self.state == "start":
            match = OPENING_TAG.match(self.undecided_text, partial=True)
            if match is not None and match.partial and not is_final:
                return "", ""
            if match is not None and not match.partial:
                self.tag, self.undecided_text = match["tag"], self.undecided_text[match.end() :]
            self.state = "answer" if self.tag is None else "begun"
        if self.state == "begun":
            self.undecided_text = self.undecided_text.lstrip()
            self.state = "reasoning" if self.undecided_text else "begun"
        if self.state == "reasoning":
            match = CLOSING_TAG[self.tag or ""].search(self.undecided_text, partial=True)
            end = len(self.undecided_text) if match is None or (match.partial and is_final) else match.start()
            reasoning, self.undecided_text = self.undecided_text[:end], self.undecided_text[end:]
            if match is not None and not match.partial:
                self.state, self.undecided_text = "closed", self.undecided_text[match.end() - end :]
            reasoning = reasoning.rstrip() if is_final and self.state == "reasoning" else reasoning
        if self.state == "closed":
            self.undecided_text = self.undecided_text.lstrip()
            self.state = "answer" if self.undecided_text else "closed"
        answer = ""
        if self.state == "answer":
            answer, self.undecided_text = self.undecided_text, ""
        return reasoning, answer
