#!/bin/sh
# The last lines of `docker compose up`.
cat <<TEXT

The fleet is up. Try it, from another terminal:

  curl http://127.0.0.1:$PORT/v1/chat/completions -H 'content-type: application/json' -d '{"model": "any", "messages": [{"role": "user", "content": "hello"}]}'

The load of every rank:
  curl http://127.0.0.1:$ADMIN_PORT/loads

The engines' own placement against dp-extproc, as tables:
  docker compose --profile load run --rm load

An engine fails and restarts:
  docker compose kill decode-2
  docker compose start decode-2

TEXT
exec sleep infinity
