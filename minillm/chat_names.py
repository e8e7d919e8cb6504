"""What the names in a file of conversations mean: its roles, and the keys of its records and turns.

    names = Names("q:user,a:assistant")          # the tables below, and what --map says
    names.role("Human")                          # "user"
"""
from minillm.errors import UserError

ROLES = {
    "user": ("user", "human", "prompter", "usr", "client", "用户", "人类", "客户"),
    "assistant": ("assistant", "gpt", "bot", "model", "chatgpt", "ai", "bing", "bard", "chatbot",
                  "gpt4", "gpt-4", "gpt-3.5", "gpt-3.5-turbo", "claude", "gemini", "llm", "agent",
                  "助手", "助理", "机器人", "模型"),
    "system": ("system", "developer", "sys", "系统"),
    "tool": ("tool", "tools", "function", "function_call", "function_response", "function_result",
             "observation", "tool_call", "tool_calls", "tool_response", "tool_result", "ipython",
             "environment", "工具"),
}
MESSAGES = ("conversations", "messages", "conversation", "dialogue", "dialog", "chat", "turns", "data")
QUESTIONS = ("instruction", "prompt", "question", "query", "problem")
ANSWERS = ("output", "response", "completion", "answer", "target", "reply")
SYSTEMS = ("system", "system_prompt", "system_message")
ROLE_KEYS = ("from", "role", "speaker", "sender")
CONTENT_KEYS = ("value", "content", "text", "utterance", "message")
FLAGS = ("weight", "loss_weight", "loss_mask", "loss", "train", "trainable")
# left out on purpose, and said; a model of this size learns the answer, not how it was found
LEFT_OUT = {"reasoning_content", "reasoning", "thinking", "thought", "thoughts", "tools", "tool_calls",
            "tool_call", "functions", "function_call", "images", "image", "audio", "audios", "videos"}
# says which record this is, and where it comes from, and nothing about what is said in it
IDS = {"id", "_id", "idx", "index", "uid", "uuid", "prompt_id", "conversation_id", "tool_call_id"}
ORIGIN = {"source", "dataset", "category", "kind", "type", "lang", "language"}
METADATA = IDS | ORIGIN
# says what a file is, beside the list of its records
ABOUT_A_FILE = ORIGIN | {"version", "name", "description", "license", "author", "date", "url", "format",
                         "split", "homepage", "created", "code", "msg", "status", "citation"}


class Names:
    """What the names in a file mean: those above, and those of `mapping`, "q:user,a:assistant"."""

    def __init__(self, mapping=""):
        self.roles = {name: role for role, names in ROLES.items() for name in names}
        keys = {"user": QUESTIONS, "assistant": ANSWERS, "system": SYSTEMS, "tool": (),
                "role": ROLE_KEYS, "content": CONTENT_KEYS, "messages": MESSAGES,
                "history": ("history",)}
        given = {meaning: [] for meaning in keys}        # by --map
        for pair in filter(None, mapping.split(",")):
            name, colon, meaning = pair.rpartition(":")
            name, meaning = name.strip(), meaning.strip()
            if not colon or not name or meaning not in keys:
                raise UserError(f"--map={mapping} must be NAME:MEANING,…, "
                                f"with a meaning of {', '.join(keys)}")
            given[meaning].append(name)
            if meaning in ROLES:
                self.roles[name.casefold()] = meaning
        self.mapped = set().union(*given.values())
        self.keys = {meaning: (*given[meaning], *names) for meaning, names in keys.items()}
        self.answer_keys = set(self.keys["assistant"])
        self.known = {"input"}.union(*self.keys.values())

    def role(self, name):
        """user, assistant, system or tool; None for a name without a meaning."""
        return self.roles.get(name.strip().casefold()) if isinstance(name, str) else None

    def role_of_key(self, key):
        """What a key of a pair such as {"human": …, "assistant": …} says; None if nothing."""
        if key in self.keys["user"] or key == "input":
            return "user"
        if key in self.answer_keys:
            return "assistant"
        return self.role(key)

    def place_in_pair(self, key):
        """Sorts the keys of a pair as they are said, also where a file has them sorted by name."""
        order = ("system", "user", "assistant", "tool")
        return order.index(self.role_of_key(key)), key == "input"


NAMES = Names()
