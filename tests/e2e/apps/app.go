// Go's net/http server with its application.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

var (
	notes    *os.File
	limit, _ = strconv.ParseInt(os.Getenv("APP_BODY_LIMIT"), 10, 64)
)

func note(id, event string) {
	line, _ := json.Marshal(map[string]any{"time": float64(time.Now().UnixMicro()) / 1e6, "id": id, "event": event})
	notes.Write(append(line, '\n'))
}

func appendTo(path string) *os.File {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		log.Fatal(err)
	}
	return file
}

func answer(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "text/plain")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.Header().Set("X-App", "1")
	w.WriteHeader(status)
	w.Write(body)
	w.(http.Flusher).Flush()
}

func handle(w http.ResponseWriter, r *http.Request) {
	path := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	id := path[len(path)-1]
	note(id, "begin")
	if limit > 0 {
		r.Body = http.MaxBytesReader(w, r.Body, limit)
	}
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		if _, over := err.(*http.MaxBytesError); !over {
			return // the client has left
		}
		answer(w, http.StatusRequestEntityTooLarge, []byte("too large\n"))
		note(id, "end")
		return
	}
	status, body := http.StatusOK, []byte("ok\n")
	switch {
	case path[0] == "ok":
	case path[0] == "slow" && len(path) == 3:
		seconds, _ := strconv.ParseFloat(path[1], 64)
		time.Sleep(time.Duration(seconds * float64(time.Second)))
	case path[0] == "exit":
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	case path[0] == "big" && len(path) == 3:
		size, _ := strconv.Atoi(path[1])
		body = bytes.Repeat([]byte("x"), size)
	default:
		status, body = http.StatusNotFound, []byte("unknown\n")
	}
	answer(w, status, body)
	note(id, "end")
}

func main() {
	notes = appendTo(os.Getenv("APP_LOG"))
	server := http.Server{Handler: http.HandlerFunc(handle)}
	if seconds, err := strconv.ParseFloat(os.Getenv("APP_KEEP_ALIVE"), 64); err == nil {
		server.IdleTimeout = time.Duration(seconds * float64(time.Second))
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(os.Getenv("APP_ADDRESS"), os.Getenv("APP_PORT")))
	if err != nil {
		log.Fatal(err)
	}
	asked, done := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(asked, syscall.SIGTERM)
	go func() {
		<-asked
		server.Shutdown(context.Background())
		close(done)
	}()
	workers := appendTo(os.Getenv("APP_LOG") + ".workers")
	workers.WriteString(strconv.Itoa(os.Getpid()) + "\n")
	workers.Close()
	if err := server.Serve(listener); err != http.ErrServerClosed {
		log.Fatal(err)
	}
	<-done
}
