{{- define "dp-extproc.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- /* Names of objects. 50 characters leave room for suffixes. */ -}}
{{- define "dp-extproc.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "dp-extproc.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "dp-extproc.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* Labels by which objects select pods. They can never change. */ -}}
{{- define "dp-extproc.selectorLabels" -}}
app.kubernetes.io/name: {{ include "dp-extproc.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: router
{{- end -}}

{{- define "dp-extproc.labels" -}}
{{ include "dp-extproc.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: dp-extproc
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "dp-extproc.metadata" -}}
name: {{ include "dp-extproc.fullname" . }}
namespace: {{ .Release.Namespace }}
labels: {{- include "dp-extproc.labels" . | nindent 2 }}
{{- end -}}

{{- define "dp-extproc.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "dp-extproc.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* The name of an image: a digest wins over a tag. Takes the image and the tag to use if none is given. */ -}}
{{- define "dp-extproc.image" -}}
{{- $image := index . 0 -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default (index . 1) $image.tag) -}}
{{- end -}}
{{- end -}}
