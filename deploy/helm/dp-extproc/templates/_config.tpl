{{- /* What each topology needs in the configuration. Values of config take effect over it. */ -}}
{{- define "dp-extproc.topologyConfig" -}}
{{- $port := include "dp-extproc.port" (default ":9002" (dig "listen" "grpc" "" .Values.config)) -}}
{{- if eq .Values.topology "sidecar" -}}
listen: {grpc: "127.0.0.1:9002", admin: "0.0.0.0:9090"}
envoy:
  inference: 0.0.0.0:8080
  admin: {{ ternary "0.0.0.0:9901" "127.0.0.1:9901" .Values.envoy.exposeAdmin }}
# Envoy has ended before the service is stopped, so there is nothing left to wait for.
drain: 1s
{{- else -}}
listen:
  grpc: 0.0.0.0:9002
  admin: 0.0.0.0:9090
  # Brackets fit addresses of both families.
  advertise: "[${POD_IP}]:{{ $port }}"
{{- if .Values.tls.secret }}
  tls:
    cert: /etc/dp-extproc-tls/tls.crt
    key: /etc/dp-extproc-tls/tls.key
    {{- if .Values.tls.clientCertificates }}
    client_ca: /etc/dp-extproc-tls/ca.crt
    {{- end }}
{{- else if and .Values.tls.selfSigned (eq .Values.topology "picker") }}
  tls: {self_signed: true}
{{- end }}
{{- if eq .Values.topology "picker" }}
  # Kubelets probe it, and GKE's gateways.
  health: 0.0.0.0:9003
protocol: endpoint_picker
{{- end }}
envoy:
  inference: 0.0.0.0:8080
  service: {{ include "dp-extproc.host" . }}:{{ $port }}
  {{- if .Values.tls.secret }}
  # Paths in the gateway's Envoy.
  service_tls:
    ca: /etc/dp-extproc-tls/ca.crt
    name: {{ default (include "dp-extproc.host" .) .Values.tls.name }}
    {{- if .Values.tls.clientCertificates }}
    cert: /etc/dp-extproc-tls/tls.crt
    key: /etc/dp-extproc-tls/tls.key
    {{- end }}
  {{- end }}
{{- end }}
{{- if .Values.sync.secret.name }}
sync: {url: "${SYNC_URL}"}
{{- else if .Values.sync.url }}
sync: {url: {{ .Values.sync.url | quote }}}
{{- end }}
{{- end -}}

{{- define "dp-extproc.host" -}}
{{ include "dp-extproc.serviceName" . }}.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}
{{- end -}}

{{- /* A headless Service cannot become another one, so it has a name of its own. */ -}}
{{- define "dp-extproc.serviceName" -}}
{{ include "dp-extproc.fullname" . }}{{ if eq .Values.topology "service" }}-headless{{ end }}
{{- end -}}

{{- /* The whole configuration of the service, with the short forms of the chart written out. */ -}}
{{- define "dp-extproc.config" -}}
{{- $config := mustMergeOverwrite (include "dp-extproc.topologyConfig" . | fromYaml) (deepCopy .Values.config) -}}
{{- range $pool := $config.pools -}}
  {{- range $role := list "prefill" "decode" "workers" -}}
    {{- $sources := get $pool $role -}}
    {{- if and (kindIs "map" $sources) (or (hasKey $sources "service") (hasKey $sources "selector") (hasKey $sources "pods") (hasKey $sources "inference_pool")) -}}
      {{- $_ := set $pool $role (dict "kubernetes" $sources) -}}
    {{- end -}}
  {{- end -}}
  {{- $answering := hasKey $pool "prefill" | ternary "decode" "workers" -}}
  {{- if and (eq $.Values.topology "picker") (not (or $pool.workers $pool.decode)) $.Values.inferencePool.create -}}
    {{- $_ := set $pool $answering (include "dp-extproc.inferencePoolWorkers" $ | fromYaml) -}}
  {{- end -}}
  {{- if and (kindIs "map" $pool.api_key) (hasKey (default dict $pool.api_key) "secret") -}}
    {{- $_ := set $pool "api_key" (dict "file" (printf "%s/%s/%s" "/etc/dp-extproc-keys" $pool.api_key.secret (default "api-key" $pool.api_key.key))) -}}
  {{- end -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{- /* The pods of the InferencePool, as endpoints: one for each port. */ -}}
{{- define "dp-extproc.inferencePoolWorkers" -}}
{{- $labels := list -}}
{{- range $key, $value := .Values.inferencePool.matchLabels -}}
  {{- $labels = append $labels (printf "%s=%s" $key $value) -}}
{{- end -}}
kubernetes:
{{- range .Values.inferencePool.targetPorts }}
- {pods: {{ join "," $labels | quote }}, port: {{ . }}}
{{- end }}
{{- end -}}

{{- /* Secrets with API keys that pools name: a JSON list of names. */ -}}
{{- define "dp-extproc.apiKeySecrets" -}}
{{- $secrets := list -}}
{{- range .Values.config.pools -}}
  {{- $secrets = append $secrets (get (default dict .api_key) "secret") -}}
{{- end -}}
{{- $secrets | compact | uniq | toJson -}}
{{- end -}}

{{- /* The port of an address such as 0.0.0.0:9002. */ -}}
{{- define "dp-extproc.port" -}}
{{- regexFind "[0-9]+$" . -}}
{{- end -}}

{{- /* What the discovery of Kubernetes reads: for each namespace a list of resources, as JSON. */ -}}
{{- define "dp-extproc.discovery" -}}
{{- $namespaces := dict -}}
{{- range $pool := (include "dp-extproc.config" . | fromYaml).pools -}}
  {{- range $role := list "prefill" "decode" "workers" -}}
    {{- $kubernetes := get (default dict (get $pool $role)) "kubernetes" -}}
    {{- range (kindIs "map" $kubernetes | ternary (list $kubernetes) (default list $kubernetes)) -}}
      {{- $namespace := default $.Release.Namespace .namespace -}}
      {{- $resources := hasKey . "pods" | ternary (list "pods") (list "endpointslices") -}}
      {{- if hasKey . "inference_pool" -}}
        {{- $resources = list "inferencepools" "pods" -}}
      {{- end -}}
      {{- $_ := set $namespaces $namespace (concat (default list (get $namespaces $namespace)) $resources | uniq | sortAlpha) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- toJson $namespaces -}}
{{- end -}}

{{- /* Seconds of a duration such as 250ms, 10s, 5m or 1h, rounded up. */ -}}
{{- define "dp-extproc.seconds" -}}
{{- $unit := get (dict "ms" 0.001 "s" 1.0 "m" 60.0 "h" 3600.0) (regexFind "[a-z]+$" .) -}}
{{- mulf (regexFind "^[0-9.]+" . | float64) (default 1.0 $unit) | ceil -}}
{{- end -}}

{{- /* Refuses values that would not work together. */ -}}
{{- define "dp-extproc.validate" -}}
{{- $config := include "dp-extproc.config" . | fromYaml -}}
{{- if $config.Error -}}
  {{- fail (printf "the configuration cannot be rendered: %s" $config.Error) -}}
{{- end -}}
{{- if not $config.pools -}}
  {{- fail "config.pools is empty; name the engines, such as config: {pools: [{models: [\"*\"], prefill: {service: NAME}, decode: {service: NAME}}]}" -}}
{{- end -}}
{{- $read := dict "listen.grpc" $config.listen.grpc "listen.admin" $config.listen.admin "listen.workers" $config.listen.workers
  "envoy.inference" $config.envoy.inference "envoy.admin" $config.envoy.admin "drain" $config.drain -}}
{{- range $key, $value := $read -}}
  {{- if regexMatch "}[a-z]*$" (toString $value) -}}
    {{- fail (printf "config.%s is %v, but ports and the time to stop follow it, and the chart does not have the value of that variable; write the value" $key $value) -}}
  {{- end -}}
{{- end -}}
{{- $several := or .Values.autoscaling.enabled (gt (int .Values.replicas) 1) -}}
{{- if and $several (not $config.sync) -}}
  {{- fail "several replicas need a bus, or each would place requests without those of the others; set sync.url to redis://HOST:6379 or sync.secret.name" -}}
{{- end -}}
{{- if and $several (hasPrefix "unix:" (default "" (default dict $config.sync).url)) -}}
  {{- fail "the bus unix:// is for processes of one pod; several replicas need redis://" -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled (or .Values.podMonitor.enabled .Values.serviceMonitor.enabled) (not .Values.networkPolicy.monitoring) (not .Values.networkPolicy.extraIngress) -}}
  {{- fail "networkPolicy.monitoring is empty, so Prometheus would reach no metrics; set it to [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: NAMESPACE}}}]" -}}
{{- end -}}
{{- if and .Values.tls.secret (eq .Values.topology "sidecar") -}}
  {{- fail "tls.secret is for the topologies service and picker; in the topology sidecar Envoy reaches the service inside of the pod" -}}
{{- end -}}
{{- if eq .Values.topology "picker" -}}
  {{- range $config.pools -}}
    {{- if and .prefill (eq $.Values.inferencePool.failureMode "FailOpen") -}}
      {{- fail "inferencePool.failureMode is FailOpen, but a request without a pick would end a prefill engine; write FailClose for a pool with prefill and decode" -}}
    {{- end -}}
  {{- end -}}
  {{- if gt (int (default 1 $config.listen.workers)) 1 -}}
    {{- fail "a gateway uses one port of an endpoint picker; leave config.listen.workers out and raise replicas" -}}
  {{- end -}}
  {{- if and .Values.inferencePool.create (not .Values.inferencePool.matchLabels) -}}
    {{- fail "inferencePool.matchLabels is empty; write the labels of the engines' pods, or set inferencePool.create to false" -}}
  {{- end -}}
{{- end -}}
{{- end -}}
