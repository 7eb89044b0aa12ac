"""Process 1 of a test host: its own name and files; then it reaps what others leave. Started by cluster_hosts.py."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Set the host up as the JSON on the command line says, print `ready`, and live until killed."""
    settings = json.loads(sys.argv[1])
    socket.sethostname(settings["name"])
    for folder in settings["own_folders"]:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", folder], check=True)
    for source, target in settings["own_files"]:
        subprocess.run(["mount", "--bind", source, target], check=True)
    Path("/run/sshd").mkdir()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    print("ready", flush=True)
    os.close(1)
    while True:
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED)
        except ChildProcessError:
            # No orphan yet; a signal would not wake us, so look again soon.
            subprocess.run(["sleep", "0.2"], check=False)


if __name__ == "__main__":
    main()
