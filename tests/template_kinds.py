"""Kinds of chat template: what templates of known models do, each in the fewest lines that do it.

Every kind has its template, its control tokens, and by hand what two chats become: SYSTEM is a system prompt S and a
message A; PREFILL is a message A and the beginning B of a reply. `changed` says which further chats it does not take as
they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

GEN = "{% if add_generation_prompt %}"
END = "{% endif %}"
TURNS = (
    "{% for m in turns %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
SPLIT = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    + GEN + "{{ '<|im_start|>assistant\n' }}" + END
)  # fmt: skip
JOINED, LATER, OPENED, FOLDED = "joined", "sent as the user's", "before the greeting", "in the first user turn"


@dataclass(frozen=True)
class Kind:
    """One kind of template."""

    template: str | dict[str, str]
    system: str
    prefill: str
    tokens: tuple[str, ...] = ()
    refuses: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Chat -> words of the notes of how its form was changed; a chat that is not named is taken as it is."""


STRICT = {"two systems": (JOINED, LATER), "greeting": (OPENED,), "two users": (JOINED,)}
"""The user and the assistant in turns, one system prompt before them."""
USERS_FIRST = {"two systems": (LATER,), "greeting": (OPENED,)}
NO_SYSTEM = {
    "system": (FOLDED,), "two systems": (JOINED, LATER, FOLDED), "greeting": (FOLDED,), "two users": (JOINED,)
}  # fmt: skip

KINDS: dict[str, Kind] = {
    "chatml": Kind(
        CHATML,
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "a default system prompt": Kind(
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nDefault.<|im_end|>\n' }}{% endif %}" + CHATML,
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nDefault.<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "headers, trimmed": Kind(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
        " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        + GEN + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}" + END,
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nA"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>user<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nB",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "a date and tools in the system turn": Kind(
        "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}" + SPLIT
        + "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '\n' }}"
        "{% if tools is not none %}{{ tools | tojson }}{% endif %}{{ system + '<|eot_id|>' }}"
        "{% for m in turns %}{% if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}{% endif %}"
        "{% endfor %}" + GEN + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}" + END,
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\nS<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nB",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "today's year": Kind(
        "{{ strftime_now('%Y')[:2] + '\n' }}" + CHATML,
        "20\n<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n",
        "20\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "system in the first instruction, spaces": Kind(
        SPLIT + TURNS + "{% for m in turns %}{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content"
        " if loop.first and system else m.content %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + text | trim + ' [/INST]' }}{% else %}{{ ' ' + text | trim + ' ' + eos_token }}"
        "{% endif %}{% endfor %}",
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nA [/INST]",
        "<s>[INST] A [/INST] B",
        refuses=STRICT,
    ),
    "no system, in turns, spaces": Kind(
        "{% set turns = messages %}" + TURNS + "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] S\n\nA [/INST]",
        "<s>[INST] A [/INST] B",
        ("[INST]", "[/INST]"),
        NO_SYSTEM,
    ),
    "system in the last user turn": Kind(
        SPLIT + TURNS + "{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}{{ '[INST]' }}"
        "{% if loop.last and system %}{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}{% else %}"
        "{{ m.content + eos_token }}{% endif %}{% endfor %}",
        "<s>[INST]S\n\nA[/INST]",
        "<s>[INST]A[/INST]B",
        ("[INST]", "[/INST]"),
        STRICT,
    ),
    "a special token for system": Kind(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{% elif m.role == 'user' %}"
        "{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]A[/INST]",
        "<s>[INST]A[/INST]B",
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    "system refused, the role is model": Kind(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% set turns = messages %}" + TURNS + "{% for m in messages %}{{ '<start_of_turn>' +"
        " ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        + GEN + "{{ '<start_of_turn>model\n' }}" + END,
        "<s><start_of_turn>user\nS\n\nA<end_of_turn>\n<start_of_turn>model\n",
        "<s><start_of_turn>user\nA<end_of_turn>\n<start_of_turn>model\nB",
        ("<start_of_turn>", "<end_of_turn>"),
        NO_SYSTEM,
    ),
    "system folded by the template, parts": Kind(
        SPLIT + TURNS + "{{ bos_token }}{% for m in turns %}{{ '<start_of_turn>' +"
        " ('model' if m.role == 'assistant' else m.role) + '\n' + (system + '\n\n' if loop.first and system else '') }}"
        "{% if m.content is string %}{{ m.content | trim }}{% elif m.content is iterable %}{% for p in m.content %}"
        "{{ p.text }}{% endfor %}{% else %}{{ raise_exception('Invalid content type') }}{% endif %}"
        "{{ '<end_of_turn>\n' }}{% endfor %}" + GEN + "{{ '<start_of_turn>model\n' }}" + END,
        "<s><start_of_turn>user\nS\n\nA<end_of_turn>\n<start_of_turn>model\n",
        "<s><start_of_turn>user\nA<end_of_turn>\n<start_of_turn>model\nB",
        ("<start_of_turn>", "<end_of_turn>"),
        STRICT,
    ),
    "roles as tokens, eos after each": Kind(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        + GEN + "{{ '<|assistant|>\n' }}" + END,
        "<|system|>\nS</s>\n<|user|>\nA</s>\n<|assistant|>\n",
        "<|user|>\nA</s>\n<|assistant|>\nB",
        ("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "a space before a reply": Kind(
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ ' ' + m.content + eos_token if m.role == 'assistant' else"
        " m.content }}{% endfor %}" + GEN + "{{ '<|assistant|>' }}" + END,
        "<|system|>S<|user|>A<|assistant|>",
        "<|user|>A<|assistant|> B",
        ("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "words for roles": Kind(
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'user' %}"
        "{{ 'USER: ' + m.content + '\n' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token + '\n' }}{% endif %}"
        "{% endfor %}" + GEN + "{{ 'ASSISTANT:' }}" + END,
        "S\n\nUSER: A\nASSISTANT:",
        "USER: A\nASSISTANT: B",
    ),
    "instruction and response": Kind(
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'user' %}"
        "{{ '### Instruction:\n' + m.content + '\n\n' }}{% else %}{{ '### Response:\n' + m.content + '\n\n' }}"
        "{% endif %}{% endfor %}" + GEN + "{{ '### Response:\n' }}" + END,
        "S\n\n### Instruction:\nA\n\n### Response:\n",
        "### Instruction:\nA\n\n### Response:\nB",
    ),
    "a system prompt and then pairs": Kind(
        SPLIT + TURNS + "{{ system + '\n' if system }}{% for m in turns %}{{ 'GPT4 Correct ' + m.role | title + ': ' +"
        " m.content + '<|end_of_turn|>' }}{% endfor %}" + GEN + "{{ 'GPT4 Correct Assistant:' }}" + END,
        "S\nGPT4 Correct User: A<|end_of_turn|>GPT4 Correct Assistant:",
        "GPT4 Correct User: A<|end_of_turn|>GPT4 Correct Assistant: B",
        ("<|end_of_turn|>",),
        STRICT,
    ),
    "thoughts dropped from the past and opened for the reply": Kind(
        SPLIT + "{{ bos_token + system }}{% for m in turns %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
        "{% elif m.role == 'assistant' %}{% set text = m.content %}{% if '</think>' in text %}"
        "{% set text = text.split('</think>')[-1] %}{% endif %}{{ '<|Assistant|>' + text + eos_token }}{% endif %}"
        "{% endfor %}" + GEN + "{{ '<|Assistant|><think>\n' }}" + END,
        "<s>S<|User|>A<|Assistant|><think>\n",
        "<s><|User|>A<|Assistant|>B",
        ("<|User|>", "<|Assistant|>"),
        {"two systems": (LATER,)},
    ),
    "a switch for thoughts, empty ones in the last reply": Kind(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{{ '<think>\n\n</think>\n\n' if loop.last }}{{ text }}{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}" + GEN + "{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
        + END + END,
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nB",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "a switch with another name": Kind(
        "{{ 'Think first.\n' if thinking }}" + CHATML,
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "thoughts as special tokens": Kind(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ '[SYSTEM_PROMPT]Think in [THINK]these[/THINK]. ' + m.content + '[/SYSTEM_PROMPT]' }}"
        "{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}"
        "{% endif %}{% endfor %}",
        "<s>[SYSTEM_PROMPT]Think in [THINK]these[/THINK]. S[/SYSTEM_PROMPT][INST]A[/INST]",
        "<s>[INST]A[/INST]B",
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]"),
    ),
    "channels": Kind(
        "{{ '<|start|>system<|message|>Valid channels: analysis, final.<|end|>' }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content +"
        " ('<|return|>' if loop.last else '<|end|>') }}{% else %}{{ '<|start|>' + ('developer' if m.role == 'system'"
        " else m.role) + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        + GEN + "{{ '<|start|>assistant' }}" + END,
        "<|start|>system<|message|>Valid channels: analysis, final.<|end|><|start|>developer<|message|>S<|end|>"
        "<|start|>user<|message|>A<|end|><|start|>assistant",
        "<|start|>system<|message|>Valid channels: analysis, final.<|end|><|start|>user<|message|>A<|end|>"
        "<|start|>assistant<|channel|>final<|message|>B",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
    ),
    "system left out silently": Kind(
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<human>: ' + m.content + '\n' }}"
        "{% elif m.role == 'assistant' %}{{ '<bot>: ' + m.content + '\n' }}{% endif %}{% endfor %}"
        + GEN + "{{ '<bot>:' }}" + END,
        "<human>: S\n\nA\n<bot>:",
        "<human>: A\n<bot>: B",
        refuses={"system": (FOLDED,), "two systems": (LATER, FOLDED), "greeting": (FOLDED,)},
    ),
    "a greeting left out silently": Kind(
        "{% set ns = namespace(begun=false) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.begun = true %}"
        "{% endif %}{% if ns.begun or m.role == 'system' %}{{ '[' + m.role + ']' + m.content }}{% endif %}{% endfor %}"
        + GEN + "{{ '[assistant]' }}" + END,
        "[system]S[user]A[assistant]",
        "[user]A[assistant]B",
        refuses={"greeting": (OPENED,)},
    ),
    "one system prompt, first": Kind(
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('System message must be at the beginning') }}{% endif %}"
        "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}" + GEN + "{{ '<|assistant|>' }}" + END,
        "<|system|>S<|end|><|user|>A<|end|><|assistant|>",
        "<|user|>A<|end|><|assistant|>B",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        {"two systems": (LATER,)},
    ),
    "the user first": Kind(
        SPLIT + "{% if turns[0].role != 'user' %}{{ raise_exception('the user has to begin') }}{% endif %}" + CHATML,
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB",
        ("<|im_start|>", "<|im_end|>"),
        {"greeting": (OPENED,)},
    ),
    "the user last": Kind(
        "{% if messages[-1].role != 'user' %}{{ raise_exception('the last message must be from the user') }}{% endif %}"
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}{{ '<|assistant|>' }}",
        "<|system|>S<|user|>A<|assistant|>",
        "<|user|>A<|assistant|>B",
        ("<|system|>", "<|user|>", "<|assistant|>"),
        {"two systems": (LATER,)},
    ),
    "unknown roles are an undefined name": Kind(
        "{% set names = {'user': 'Q', 'assistant': 'A'} %}{% for m in messages %}{{ names[m.role] + ': ' + m.content"
        " + '\n' }}{% endfor %}" + GEN + "{{ 'A: ' }}" + END,
        "Q: S\n\nA\nA: ",
        "Q: A\nA: B",
        refuses={"system": (FOLDED,), "two systems": (LATER, FOLDED), "greeting": (FOLDED,)},
    ),
    "turn tokens": Kind(
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + {'system': '<|SYSTEM_TOKEN|>', 'user':"
        " '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] + m.content + '<|END_OF_TURN_TOKEN|>' }}"
        "{% endfor %}" + GEN + "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}" + END,
        "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>A"
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>A<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>B",
        ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ),
    "a prefix before the chat": Kind(
        "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        + GEN + "{{ '<|assistant|>\n' }}" + END,
        "[gMASK]<sop><|system|>\nS<|user|>\nA<|assistant|>\n",
        "[gMASK]<sop><|user|>\nA<|assistant|>\nB",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "tags of training, loop controls": Kind(
        "{% for m in messages %}{% if m.role == 'ghost' %}{% continue %}{% endif %}{{ '<|' + m.role + '|>' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}"
        "{{ m.content }}{% endif %}{% endfor %}" + GEN + "{{ '<|assistant|>' }}" + END,
        "<|system|>S<|user|>A<|assistant|>",
        "<|user|>A<|assistant|>B",
        ("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "several templates, one the default": Kind(
        {"default": CHATML, "tool_use": "{{ raise_exception('tools') }}"},
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB",
        ("<|im_start|>", "<|im_end|>"),
    ),
}  # fmt: skip
