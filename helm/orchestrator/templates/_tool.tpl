{{/* Spec of a pod that runs one command: (list root name command [more env]). */}}
{{- define "manta.toolPod" -}}
{{- $root := index . 0 -}}
serviceAccountName: {{ include "manta.serviceAccount" (list $root "tools") }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "manta.podSecurity" $root | nindent 2 }}
{{- include "manta.placement" (list $root (dict)) }}
containers:
  {{- include "manta.toolContainer" . | nindent 2 }}
volumes:
  - name: tmp
    emptyDir: {}
{{- end -}}

{{- define "manta.toolContainer" -}}
{{- $root := index . 0 -}}
- name: {{ index . 1 }}
  image: {{ include "manta.image" (list $root "cpu") }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  command: {{ toJson (index . 2) }}
  env:
    {{- include "manta.clientEnv" $root | nindent 4 }}
    - name: HOME # nothing else can be written to
      value: /tmp
    - name: MANTA_HOME
      value: /tmp/manta
    {{- if gt (len .) 3 }}
    {{- toYaml (index . 3) | nindent 4 }}
    {{- end }}
  {{- with include "manta.clientEnvFrom" $root | trim }}
  envFrom:
    {{- . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- include "manta.containerSecurity" (list $root true) | nindent 4 }}
  resources:
    {{- toYaml $root.Values.tools.resources | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
{{- end -}}
