{{- /* Parts of the containers that run the image of the service. */ -}}
{{- define "dp-extproc.env" -}}
- {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
{{- if .Values.sync.secret.name }}
- {name: SYNC_URL, valueFrom: {secretKeyRef: {name: {{ .Values.sync.secret.name }}, key: {{ .Values.sync.secret.key }}}}}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "dp-extproc.volumeMounts" -}}
- {name: config, mountPath: /etc/dp-extproc, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- if .Values.tls.secret }}
- {name: tls, mountPath: /etc/dp-extproc-tls, readOnly: true}
{{- end }}
{{- range $index, $secret := include "dp-extproc.apiKeySecrets" . | fromJsonArray }}
- {name: api-key-{{ $index }}, mountPath: /etc/dp-extproc-keys/{{ $secret }}, readOnly: true}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "dp-extproc.volumes" -}}
- {name: config, configMap: {name: {{ include "dp-extproc.fullname" . }}}}
- {name: tmp, emptyDir: {}}
{{- if eq .Values.topology "sidecar" }}
- {name: envoy-config, emptyDir: {}}
- {name: envoy-tmp, emptyDir: {}}
{{- end }}
{{- if .Values.tls.secret }}
- {name: tls, secret: {secretName: {{ .Values.tls.secret }}}}
{{- end }}
{{- range $index, $secret := include "dp-extproc.apiKeySecrets" . | fromJsonArray }}
- {name: api-key-{{ $index }}, secret: {secretName: {{ $secret }}}}
{{- end }}
{{- if include "dp-extproc.discovery" . | fromJson }}
# What Kubernetes would mount into every container. Only the service gets it.
- name: service-account
  projected:
    sources:
    - serviceAccountToken: {path: token, expirationSeconds: 3600}
    - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
    - downwardAPI: {items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* The container of the service. */ -}}
{{- define "dp-extproc.container" -}}
{{- $config := include "dp-extproc.config" . | fromYaml -}}
{{- $grpc := include "dp-extproc.port" $config.listen.grpc | int -}}
{{- $workers := int (default 1 $config.listen.workers) -}}
name: dp-extproc
image: {{ include "dp-extproc.image" (list .Values.image .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args: [serve, -c, /etc/dp-extproc/dp-extproc.yaml, --log-level, {{ .Values.logLevel }}]
env: {{- include "dp-extproc.env" . | nindent 0 }}
ports:
{{- if ne .Values.topology "sidecar" }}
- {name: grpc-ext-proc, containerPort: {{ $grpc }}}
{{- range untilStep 1 $workers 1 }}
- {containerPort: {{ add $grpc . }}}
{{- end }}
{{- end }}
- {name: http-metrics, containerPort: {{ include "dp-extproc.port" $config.listen.admin }}}
{{- $probed := $grpc }}
{{- with $config.listen.health }}
{{- $probed = include "dp-extproc.port" . | int }}
- {name: grpc-health, containerPort: {{ $probed }}}
{{- end }}
# The kubelet reaches no port on loopback, has no TLS for gRPC, and a gRPC port belongs to one worker process.
{{- if or (eq .Values.topology "sidecar") (and $config.listen.tls (not $config.listen.health)) (gt $workers 1) }}
startupProbe:
  httpGet: {path: /healthz, port: http-metrics}
  periodSeconds: 1
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: http-metrics}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: http-metrics}
  periodSeconds: 2
  timeoutSeconds: 2
{{- else }}
startupProbe:
  grpc: {port: {{ $probed }}, service: liveness}
  periodSeconds: 1
  failureThreshold: 60
livenessProbe:
  grpc: {port: {{ $probed }}, service: liveness}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  grpc: {port: {{ $probed }}, service: readiness}
  periodSeconds: 2
  timeoutSeconds: 2
{{- end }}
{{- with .Values.resources }}
resources: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext: {{- toYaml .Values.securityContext | nindent 2 }}
volumeMounts: {{- include "dp-extproc.volumeMounts" . | nindent 0 }}
{{- if include "dp-extproc.discovery" . | fromJson }}
- {name: service-account, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
{{- end }}
{{- end -}}

{{- /* The containers of the topology sidecar. The service starts before Envoy and is stopped after it. */ -}}
{{- define "dp-extproc.sidecarContainers" -}}
{{- $config := include "dp-extproc.config" . | fromYaml -}}
{{- $admin := include "dp-extproc.port" $config.envoy.admin -}}
initContainers:
- name: envoy-config
  image: {{ include "dp-extproc.image" (list .Values.image .Chart.AppVersion) | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [sh, -c, 'dp-extproc envoy-config -c /etc/dp-extproc/dp-extproc.yaml > /etc/dp-extproc-envoy/envoy.yaml']
  env: {{- include "dp-extproc.env" . | nindent 2 }}
  {{- with .Values.resources }}
  resources: {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext: {{- toYaml .Values.securityContext | nindent 4 }}
  volumeMounts: {{- include "dp-extproc.volumeMounts" . | nindent 2 }}
  - {name: envoy-config, mountPath: /etc/dp-extproc-envoy}
- {{ include "dp-extproc.container" . | nindent 2 | trim }}
  restartPolicy: Always
containers:
- name: envoy
  image: {{ include "dp-extproc.image" (list .Values.envoy.image "") | quote }}
  imagePullPolicy: {{ .Values.envoy.image.pullPolicy }}
  command:
  - envoy
  - --config-path
  - /etc/dp-extproc-envoy/envoy.yaml
  - --disable-hot-restart
  - --concurrency
  - {{ .Values.envoy.concurrency | quote }}
  - --log-level
  - {{ .Values.envoy.logLevel }}
  ports:
  - {name: http, containerPort: {{ include "dp-extproc.port" $config.envoy.inference }}}
  {{- if .Values.envoy.exposeAdmin }}
  - {name: envoy-admin, containerPort: {{ $admin }}}
  {{- end }}
  # Envoy opens the port once its configuration is in use.
  startupProbe:
    tcpSocket: {port: http}
    periodSeconds: 1
    failureThreshold: 60
  livenessProbe:
    tcpSocket: {port: http}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
  readinessProbe:
    tcpSocket: {port: http}
    periodSeconds: 2
    timeoutSeconds: 2
  lifecycle:
    preStop:
      exec:
        command:
        - bash
        - -c
        - | {{- .Files.Get "files/drain-envoy.sh" | trim | nindent 10 }}
        - drain-envoy
        - {{ $admin | quote }}
        - {{ .Values.envoy.drainSeconds.least | quote }}
        - {{ .Values.envoy.drainSeconds.most | quote }}
  {{- with .Values.envoy.resources }}
  resources: {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext: {{- toYaml .Values.securityContext | nindent 4 }}
  volumeMounts:
  - {name: envoy-config, mountPath: /etc/dp-extproc-envoy, readOnly: true}
  - {name: envoy-tmp, mountPath: /tmp}
{{- end -}}
