# Runs in Envoy's container before Envoy is stopped: waits until no request is in flight, because a stopped Envoy ends
# every stream at once. Arguments: Envoy's admin port, the least and the most seconds to wait.
admin() (
  exec 3<>"/dev/tcp/localhost/$port" || exit 1
  printf '%s %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 0\r\n\r\n' "$1" "$2" >&3
  cat <&3
)
port=$1 least=$2 most=$3
# From now on each response closes its connection, so that clients connect to another pod.
admin POST /healthcheck/fail >/dev/null || exit 0
for ((second = 0; second < most; second++)); do
  # New connections arrive until every node has removed this pod from the Service, hence the least time.
  ((second >= least)) && admin GET '/stats?filter=^http.inference.downstream_rq_active$' | grep -q ': 0$' && break
  sleep 1
done
