{{- define "bitmill.labels" -}}
app.kubernetes.io/name: bitmill
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "bitmill.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "%s-cpu" .Chart.AppVersion) }}
{{- end }}

{{- define "bitmill.dashboard" -}}
http://{{ .Release.Name }}-head-svc:8265
{{- end }}

{{- /* Of every pod: who it runs as. */}}
{{- define "bitmill.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "bitmill.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{- /* What a command reads of its environment, where it runs. */}}
{{- define "bitmill.env" -}}
- {name: BITMILL_STORAGE_URI, value: {{ .Values.store.uri | quote }}}
- {name: BITMILL_LOG_FORMAT, value: json}
- {name: BITMILL_SCALE_UP_MINUTES, value: {{ .Values.cluster.scaleUpMinutes | quote }}}
- {name: MLFLOW_TRACKING_URI, value: {{ .Values.mlflow.uri | quote }}}
- {name: AWS_DEFAULT_REGION, value: {{ .Values.store.region | quote }}}
{{- with .Values.store.endpoint }}
- {name: AWS_ENDPOINT_URL, value: {{ . | quote }}}
{{- end }}
{{- end }}

{{- define "bitmill.envFrom" -}}
- secretRef: {name: {{ .Values.secrets.mlflow }}}
{{- with .Values.secrets.s3 }}
- secretRef: {name: {{ . }}}
{{- end }}
{{- end }}

{{- define "bitmill.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* A pod of Ray. Takes root, role, cpu, memory, gpus, shm, cache, nodeSelector, tolerations. */}}
{{- define "bitmill.pod" -}}
{{- $root := .root -}}
metadata:
  labels:
    {{- include "bitmill.labels" $root | nindent 4 }}
spec:
  serviceAccountName: {{ $root.Release.Name }}-{{ .role }}
  {{- if ne .role "head" }}
  automountServiceAccountToken: {{ not (empty $root.Values.serviceAccount.annotations) }}
  {{- end }}
  terminationGracePeriodSeconds: 120
  {{- include "bitmill.pullSecrets" $root | nindent 2 }}
  securityContext:
    {{- include "bitmill.podSecurity" $root | nindent 4 }}
  {{- with .nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-{{ .role }}
      image: {{ include "bitmill.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      ports:
        - {name: metrics, containerPort: 8080}
        {{- if eq .role "head" }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        {{- end }}
      env:
        {{- include "bitmill.env" $root | nindent 8 }}
        # Of the grace period: Ray drains for 30 s, and training hears of it after 5, if nobody says otherwise.
        - {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: "110"}
        - {name: RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S, value: "1"}
      envFrom:
        {{- include "bitmill.envFrom" $root | nindent 8 }}
      resources:
        requests: {cpu: {{ .cpu | quote }}, memory: {{ .memory }}}
        limits:
          memory: {{ .memory }}
          {{- if .gpus }}
          nvidia.com/gpu: {{ .gpus | quote }}
          {{- end }}
      securityContext:
        {{- include "bitmill.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        - {name: shm, mountPath: /dev/shm}
        - {name: cache, mountPath: /home/bitmill/.cache}
        - {name: ray, mountPath: /tmp}
        {{- if eq .role "head" }}
        - {name: configs, mountPath: /etc/bitmill, readOnly: true}
        {{- end }}
  volumes:
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ .shm }}}
    - name: cache  # of the node's own disk
      emptyDir: {sizeLimit: {{ .cache }}}
    - name: ray  # its sessions, logs, and what it spills
      emptyDir: {}
    {{- if eq .role "head" }}
    - name: configs
      configMap: {name: {{ $root.Release.Name }}-configs}
    {{- end }}
{{- end }}

{{- /* A cluster. Takes root, workers (by group: minReplicas, maxReplicas), autoscaling, which replicas are left to. */}}
{{- define "bitmill.cluster" -}}
{{- $root := .root -}}
{{- $cluster := $root.Values.cluster -}}
rayVersion: 2.60.0
authOptions: {mode: token, secretName: {{ $root.Values.secrets.ray }}}
enableInTreeAutoscaling: {{ .autoscaling }}
{{- if .autoscaling }}
autoscalerOptions:
  version: v2
  idleTimeoutSeconds: {{ $cluster.maxWorkersIdleSeconds }}
  resources:
    requests: {cpu: 500m, memory: 1Gi}
    limits: {memory: 1Gi}
  securityContext:
    {{- include "bitmill.containerSecurity" $root | nindent 4 }}
{{- with $cluster.redis }}
{{- if .address }}
gcsFaultToleranceOptions:
  redisAddress: {{ .address | quote }}
  {{- with .passwordSecret }}
  redisPassword:
    valueFrom:
      secretKeyRef: {name: {{ . }}, key: password}
  {{- end }}
{{- end }}
{{- end }}
{{- end }}
headGroupSpec:
  rayStartParams: {num-cpus: "0", dashboard-host: 0.0.0.0, metrics-export-port: "8080"}
  template:
    {{- $head := dict "root" $root "role" "head" "gpus" 0 "shm" "1Gi" "cache" "20Gi" }}
    {{- include "bitmill.pod" (merge $head $cluster.head) | nindent 4 }}
workerGroupSpecs:
  {{- range $name, $replicas := .workers }}
  {{- $group := required (printf "workers names the group %s, which groups lacks" $name) (index $root.Values.groups $name) }}
  - groupName: {{ $name }}
    {{- if not $.autoscaling }}
    replicas: {{ $replicas.minReplicas }}
    {{- end }}
    minReplicas: {{ $replicas.minReplicas }}
    maxReplicas: {{ $replicas.maxReplicas }}
    rayStartParams: {metrics-export-port: "8080"}
    template:
      {{- include "bitmill.pod" (merge (dict "root" $root "role" "worker") $group) | nindent 6 }}
  {{- end }}
{{- end }}
