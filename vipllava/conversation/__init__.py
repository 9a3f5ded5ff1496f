"""Conversations: chat templates, ids and labels born together, and the proof of the labels."""

from vipllava.conversation.encode import ConversationEncoder
from vipllava.conversation.label_proof import prove_labels, supervised_texts
from vipllava.conversation.templates import ChatTemplate, get_template, template_names

__all__ = [
    "ChatTemplate",
    "ConversationEncoder",
    "get_template",
    "prove_labels",
    "supervised_texts",
    "template_names",
]
