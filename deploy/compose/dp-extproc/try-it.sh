#!/bin/sh
# The last lines of `docker compose up`.
cat <<TEXT

The fleet is up. Try it, from another terminal:

  curl http://127.0.0.1:$PORT/v1/chat/completions -H 'content-type: application/json' -d '{"model": "any", "messages": [{"role": "user", "content": "hello"}]}'

What the service knows of every rank:
  curl http://127.0.0.1:$ADMIN_PORT/loads

The engines' own placement against this one, as tables:
  docker compose --profile load run --rm load

A server fails, and comes back:
  docker compose kill decode-2
  docker compose start decode-2

TEXT
exec sleep infinity
