"""A worker process that shouts back, hangs where no signal handler runs, or dies."""

import json
import os
import signal
import sys

if __name__ == "__main__":
    sys.stdout.write('"ready"\n')
    sys.stdout.flush()
    for line in sys.stdin:
        word = json.loads(line)
        if word == "hang":
            for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            while True:
                signal.pause()
        if word == "die":
            os._exit(3)
        sys.stdout.write(json.dumps(word.upper()) + "\n")
        sys.stdout.flush()
