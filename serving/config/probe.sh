#!/bin/bash
# Succeeds if each given model (NAME or NAME/versions/N) has a version that is AVAILABLE:
#
#   probe.sh PORT MODEL...
#
# The HTTP status is not enough, because it is 200 for a version that failed to load.
# The script uses bash and grep, since the TensorFlow Serving image has no curl.
set -u
port=$1
shift
for model in "$@"; do
  exec 3<>"/dev/tcp/127.0.0.1/$port" || exit 1
  printf 'GET /v1/models/%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' \
    "$model" >&3
  grep -Eq '"state": ?"AVAILABLE"' <&3 || exit 1
  exec 3>&-
done
