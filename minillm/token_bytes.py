"""The bytes that the tokens of byte-level BPE stand for.

    table, special = bytes_of_tokens(backend, "tokenizer.json")
"""
from minillm.errors import UserError


def bytes_of_tokens(backend, path):
    """([id] -> the bytes of a token, {id: name in bytes} of the special ones, which have no bytes).

    Byte-level BPE writes a byte as a printable character: those of Latin-1 as themselves, the other
    68 (controls, space …) from U+0100 on (GPT-2's table). Added tokens are written as they are.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {byte: chr(byte) for byte in printable}
    byte_of |= {0x100 + i: chr(byte) for i, byte in enumerate(others)}
    written = set(map(chr, byte_of))
    added = backend.get_added_tokens_decoder()
    table, special = [], {}
    for token in range(backend.get_vocab_size()):
        text = backend.id_to_token(token)
        if token in added and added[token].special:
            special[token] = text.encode("utf-8")
            table.append(b"")
        elif token in added:
            table.append(text.encode("utf-8"))
        elif not written.issuperset(text):
            raise UserError(f"{path} was not trained by train_tokenizer.py: token {token} is not "
                            "written in byte-level BPE")
        else:
            table.append(text.translate(byte_of).encode("latin-1"))
    lost = {bytes([byte]) for byte in range(256)} - set(table)
    if lost:
        raise UserError(f"{path} was not trained by train_tokenizer.py: it has no token for "
                        f"{len(lost)} of the 256 bytes, such as {min(lost)}")
    return table, special
