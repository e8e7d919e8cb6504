"""Ways to damage a file."""
import os


def truncate(path, share):
    """Leave the first `share` of it."""
    os.truncate(path, int(os.path.getsize(path) * share))


def flip(path, share, bit=3):
    """Flip one bit of the byte that stands at `share` of its length."""
    place = min(int(os.path.getsize(path) * share), os.path.getsize(path) - 1)
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0] ^ 1 << bit
        file.seek(place)
        file.write(bytes([byte]))
