"""What the Tab key offers in chat.py: commands, settings of /set, paths for /save and /load."""
import os


def completions(line, word, commands, settings):
    """What `word`, the last one of `line`, can become: a list of whole words."""
    if not line.startswith("/"):
        return []
    command, space, _ = line.partition(" ")
    if not space:
        return [f"/{name} " for name in commands if name.startswith(word[1:])]
    if command == "/set":
        return [f"{key}=" for key in settings if key.startswith(word)]
    if command in ("/save", "/load"):
        return paths_that_begin(word)
    return []


def paths_that_begin(text):
    """The files and folders whose path begins with `text`; a folder ends in a slash."""
    folder, name = os.path.split(text)
    try:
        entries = sorted(os.listdir(os.path.expanduser(folder) or "."))
    except OSError:
        return []
    found = []
    for entry in entries:
        if entry.startswith(name):
            path = os.path.join(folder, entry)
            is_folder = os.path.isdir(os.path.expanduser(path))
            found.append(path + "/" if is_folder else path)
    return found
